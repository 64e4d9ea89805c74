"""The cheap ends of the ridge memory's family: Hebb's rule adds, the delta rule corrects."""

import importlib.util

import torch
from torch import Tensor

from .. import _checks as check
from .._linalg import compute_dtype
from .define import backward, define
from .ridge import check_sequence, check_sequence_ends, sequences

__all__ = ["delta_memory", "hebbian_memory"]

_STATE_DTYPES = (torch.float32, torch.float64)


def _check(q, k, v, beta, decay, memory, cu_seqlens, delta: bool) -> None:
    check_sequence(q, k, v, beta=beta, decay=decay)
    _, _, heads, keys = q.shape
    count, values = sequences(q, cu_seqlens), v.shape[3]
    check.floating("initial_state", memory, _STATE_DTYPES)
    check.shape("initial_state", memory, (count, heads, keys, values), "[N, H, K, V]")
    check.same_device("initial_state", memory, q.device)


def _canonical(q, k, v, beta, decay, memory, cu_seqlens, delta: bool) -> None:
    check.floating("initial_state", memory, (compute_dtype(q),))


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? decay, Tensor memory, Tensor? cu_seqlens, bool delta"
)

_linear_memory = define(
    f"linear_memory({_ARGUMENTS}) -> (Tensor, Tensor)",
    _check,
    _canonical,
    fake=lambda q, k, v, beta, decay, memory, *rest: (_empty(v), _empty(memory)),
    values=lambda q, *rest: check_sequence_ends(rest[5], q.shape[1]),
)


def _check_gradient(d_out, d_memory, q, k, v, beta, decay, memory, *rest) -> None:
    _check(q, k, v, beta, decay, memory, *rest)
    for name, gradient, output in (("out", d_out, v), ("memory", d_memory, memory)):
        check.floating(f"d_{name}", gradient, (output.dtype,))
        check.shape(f"d_{name}", gradient, output.shape, "as the output it belongs to")
        check.same_device(f"d_{name}", gradient, output.device)


def _gradient_fake(d_out, d_memory, q, k, v, beta, decay, memory, *rest):
    d_decay = d_out.new_empty(0, dtype=torch.float32) if decay is None else _empty(decay)
    return (*map(_empty, (q, k, v, beta)), d_decay, _empty(memory))


_linear_memory_gradient = define(
    f"linear_memory_gradient(Tensor d_out, Tensor d_memory, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _check_gradient,
    lambda d_out, d_memory, *arguments: _canonical(*arguments),
    fake=_gradient_fake,
)


class LinearReadouts(torch.autograd.Function):
    """Readouts [B, T, H, V], and the memory [N, H, K, V] after each sequence. Only what came in is saved."""

    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments[:-1])
        ctx.delta = arguments[-1]
        return _linear_memory(*arguments)

    @backward
    def backward(ctx, *gradients: Tensor):
        saved = ctx.saved_tensors
        found = _linear_memory_gradient(*(g.contiguous() for g in gradients), *saved, ctx.delta)
        return *found[:4], None if saved[4] is None else found[4], found[5], None, None


def _fla_serves(q: Tensor, v: Tensor) -> bool:
    """Whether flash-linear-attention is there for a GPU's tensors of 16 bits, which its kernels are for."""
    short = q.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    return q.is_cuda and short and importlib.util.find_spec("fla") is not None


def _through_fla(q, k, v, beta, decay, memory, cu_seqlens, delta: bool) -> tuple[Tensor, Tensor]:
    """Its kernels of the gated delta rule and of gated linear attention, in this package's conventions."""
    delta_rule = importlib.import_module("fla.ops.gated_delta_rule")
    linear = importlib.import_module("fla.ops.simple_gla")
    if decay is None:
        decay = torch.zeros(q.shape[:3], dtype=torch.float32, device=q.device)
    options = {
        "scale": 1.0,
        "initial_state": memory,
        "output_final_state": True,
        "cu_seqlens": cu_seqlens,
    }
    if delta:
        return delta_rule.chunk_gated_delta_rule(q, k, v, g=decay, beta=beta.to(q.dtype), **options)
    return linear.chunk_simple_gla(q, k, v * beta.unsqueeze(-1).to(v.dtype), g=decay, **options)


def _run(q, k, v, beta, decay, initial_state, cu_seqlens, delta: bool) -> tuple[Tensor, Tensor]:
    check_sequence(q, k, v, beta=beta, decay=decay)
    if initial_state is None:
        shape = sequences(q, cu_seqlens), *q.shape[2:], v.shape[-1]
        initial_state = torch.zeros(shape, dtype=compute_dtype(q), device=q.device)
    if beta is None:
        beta = torch.ones(q.shape[:3], dtype=torch.float32, device=q.device)
    _check(q, k, v, beta, decay, initial_state, cu_seqlens, delta)
    arguments = q, k, v, beta, decay, initial_state.to(compute_dtype(q)), cu_seqlens, delta
    if _fla_serves(q, v):
        return _through_fla(*arguments)
    return LinearReadouts.apply(*arguments)


def hebbian_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read at every token a memory that adds each pair up: linear attention, with a decay gated.

    `Mₜ = γₜMₜ₋₁ + βₜkₜᵀvₜ`, `oₜ = qₜMₜ`: the ridge memory's `G` without its `H`. Differentiable.

    Args:
        q: queries, [B, T, H, K], fp32, bf16, fp16 or fp64. No scale is put to them.
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        beta: the weight of each pair, [B, T, H]; 1 if None.
        decay: log γ, [B, T, H]; None forgets nothing.
        initial_state: what an earlier call returned, [N, H, K, V], fp32 or fp64.
        cu_seqlens: where packed sequences begin and end, [N + 1], int64 or int32; then B is 1.

    Returns:
        The readouts [B, T, H, V] in v's type, and the memory after each sequence in fp32, or fp64 for fp64 q.

    Raises:
        ValueError: wrong shape, device or boundaries.
        TypeError: wrong dtype.

    Example:
        >>> readouts, memory = ek.hebbian_memory(q, k, v)

    On GPUs 16-bit inputs go through flash-linear-attention's kernel where it is installed.

    Source: Katharopoulos et al. 2020 (arXiv 2006.16236).
    """
    return _run(q, k, v, beta, decay, initial_state, cu_seqlens, delta=False)


def delta_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read at every token a memory that each pair corrects: one gradient step a token, the delta rule.

    `Mₜ = γₜMₜ₋₁ + βₜkₜᵀ(vₜ − kₜγₜMₜ₋₁)`, `oₜ = qₜMₜ`: a step of size βₜ on the squares whose minimum the
    ridge memory reads. Stable for `βₜ|kₜ|²` up to 2. Differentiable.

    Args:
        q: queries, [B, T, H, K], fp32, bf16, fp16 or fp64. No scale is put to them.
        k: keys, [B, T, H, K], usually of length 1.
        v: values, [B, T, H, V].
        beta: the size of each step, [B, T, H]; 1 if None.
        decay: log γ, [B, T, H]; None forgets nothing.
        initial_state: what an earlier call returned, [N, H, K, V], fp32 or fp64.
        cu_seqlens: where packed sequences begin and end, [N + 1], int64 or int32; then B is 1.

    Returns:
        The readouts [B, T, H, V] in v's type, and the memory after each sequence in fp32, or fp64 for fp64 q.

    Raises:
        ValueError: wrong shape, device or boundaries.
        TypeError: wrong dtype.

    Example:
        >>> readouts, memory = ek.delta_memory(q, torch.nn.functional.normalize(k, dim=-1), v)

    On GPUs 16-bit inputs go through flash-linear-attention's kernel where it is installed.

    Source: Yang et al. 2024 (arXiv 2406.06484, 2412.06464).
    """
    return _run(q, k, v, beta, decay, initial_state, cu_seqlens, delta=True)
