"""Ridge regression at test time: a memory that a sequence reads and writes at every token."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from ..errors import EngramError
from .define import backward, define
from .memory_state import check_boundaries

__all__ = ["RidgeState", "ridge_forget", "ridge_memory"]

_STATE_DTYPES = (torch.float64, torch.float32)


class RidgeState(NamedTuple):
    """What a ridge memory is made of after the last token of each sequence.

    Attributes:
        gram: `H = Σ βₜ kₜᵀkₜ`, decayed, [N, H, K, K], fp64: the readout's condition is `H`'s over the ridge.
        cross: `G = Σ βₜ kₜᵀvₜ`, decayed, [N, H, K, V], fp64.
        log_decay: the logarithm of all decay so far, [N, H], fp64: what is left of a ridge that decays.
    """

    gram: Tensor
    cross: Tensor
    log_decay: Tensor


def check_sequence(q: Tensor, k: Tensor, v: Tensor, **per_token: Tensor | None) -> None:
    """Check q and k [B, T, H, K], v [B, T, H, V], and what has one number a token and head, [B, T, H]."""
    check.floating("q", q)
    check.dimensions("q", q, "[B, T, H, K]")
    for name, rows in (("k", k), ("v", v)):
        check.floating(name, rows)
        check.same_device(name, rows, q.device)
    check.shape("k", k, q.shape, "as q")
    check.dimensions("v", v, "[B, T, H, V]")
    check.shape("v", v, (*q.shape[:3], v.shape[-1]), "[B, T, H, V], with q's B, T and H")
    for name, numbers in per_token.items():
        if numbers is not None:
            check.floating(name, numbers)
            check.shape(name, numbers, q.shape[:3], "[B, T, H], with q's")
            check.same_device(name, numbers, q.device)


def sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """Check the boundaries of packed sequences; return how many sequences there are."""
    if cu_seqlens is None:
        return q.shape[0]
    check.expect(q.shape[0] == 1, "q", "a batch of 1 where sequences are packed by cu_seqlens", q.shape[0])
    is_list = isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1
    got = list(cu_seqlens.shape) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
    check.expect(is_list, "cu_seqlens", "a tensor of shape [N + 1]", got)
    check_boundaries(cu_seqlens.shape[0] - 1, cu_seqlens, q.device)
    return cu_seqlens.shape[0] - 1


def check_sequence_ends(cu_seqlens: Tensor | None, length: int) -> None:
    """Check that boundaries begin with 0, end with the number of tokens, and do not fall."""
    if cu_seqlens is None:
        return
    ends = cu_seqlens.tolist()
    ordered = all(start <= end for start, end in pairwise(ends))
    sound = ordered and ends[0] == 0 and ends[-1] == length
    check.expect(sound, "cu_seqlens", f"numbers that do not fall, from 0 to {length}", ends)


def _check_state(count: int, q: Tensor, v: Tensor, gram: Tensor, cross: Tensor, log_decay: Tensor) -> None:
    heads, keys, values = q.shape[2], q.shape[3], v.shape[3]
    shapes = {
        "gram": (gram, (count, heads, keys, keys), "[N, H, K, K]"),
        "cross": (cross, (count, heads, keys, values), "[N, H, K, V]"),
        "log_decay": (log_decay, (count, heads), "[N, H]"),
    }
    for name, (tensor, shape, meaning) in shapes.items():
        check.floating(f"initial_state.{name}", tensor, _STATE_DTYPES)
        check.shape(f"initial_state.{name}", tensor, shape, meaning)
        check.same_device(f"initial_state.{name}", tensor, q.device)


def _check(q, k, v, beta, decay, ridge, gram, cross, log_decay, cu_seqlens, ridge_decays: bool) -> None:
    check_sequence(q, k, v, beta=beta, decay=decay)
    check.floating("ridge", ridge)
    check.shape("ridge", ridge, q.shape[2:], "[H, K]")
    check.same_device("ridge", ridge, q.device)
    _check_state(sequences(q, cu_seqlens), q, v, gram, cross, log_decay)


def _canonical(q, k, v, beta, decay, ridge, gram, cross, log_decay, cu_seqlens, ridge_decays: bool) -> None:
    for name, tensor in (("gram", gram), ("cross", cross), ("log_decay", log_decay)):
        check.floating(f"initial_state.{name}", tensor, (torch.float64,))


def _results(result, q, k, v, beta, decay, ridge, gram, cross, log_decay, cu_seqlens, ridge_decays) -> None:
    negative = beta.numel() > 0 and bool(beta.amin() < 0)
    if not negative and all(map(check.is_finite, result)):
        return
    state = (("gram", gram), ("cross", cross), ("log_decay", log_decay))
    names = ("q", q), ("k", k), ("v", v), ("beta", beta), ("decay", decay), ("ridge", ridge)
    for name, tensor in (*names, *((f"initial_state.{name}", part) for name, part in state)):
        if tensor is not None:
            check.finite(name, tensor)
    for name, tensor, bound in (("beta", beta, 0.0), ("ridge", ridge, torch.finfo(ridge.dtype).tiny)):
        if bool(tensor.amin() < bound):
            expected = "numbers of at least 0" if name == "beta" else "numbers above 0"
            raise ValueError(f"{name}: expected {expected}, got {float(tensor.amin()):g}")
    raise EngramError(
        "ridge: expected one that keeps H + Λ positive definite, got a system that is singular as far as "
        "fp64 can tell" + ("; a ridge that decays vanishes with its memory" if ridge_decays else "")
    )


def _suspect(result, q, k, v, beta, *rest) -> Tensor:
    bad = check.not_finite(*result)
    return bad | (beta < 0).any()


def _fake(q, k, v, beta, decay, ridge, gram, cross, log_decay, cu_seqlens, ridge_decays):
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gram, cross, log_decay)),
    )


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? decay, Tensor ridge, Tensor gram, Tensor cross, "
    "Tensor log_decay, Tensor? cu_seqlens, bool ridge_decays"
)

_ridge_memory = define(
    f"ridge_memory({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _check,
    _canonical,
    fake=_fake,
    values=lambda q, *rest: check_sequence_ends(rest[8], q.shape[1]),
    results=_results,
    suspect=_suspect,
    complaint="ridge_memory: expected finite arguments, beta of at least 0, and a ridge above 0 that keeps "
    "H + Λ positive definite, got others",
)


def _check_gradient(d_out, d_gram, d_cross, d_log_decay, q, k, v, *rest) -> None:
    _check(q, k, v, *rest)
    gram, cross, log_decay = rest[3:6]
    for name, gradient, output in (
        ("out", d_out, v),
        ("gram", d_gram, gram),
        ("cross", d_cross, cross),
        ("log_decay", d_log_decay, log_decay),
    ):
        check.floating(f"d_{name}", gradient, (output.dtype,))
        check.shape(f"d_{name}", gradient, output.shape, "as the output it belongs to")
        check.same_device(f"d_{name}", gradient, output.device)


def _gradient_fake(d_out, d_gram, d_cross, d_log_decay, q, k, v, beta, decay, ridge, gram, cross, log, *rest):
    def empty(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    d_decay = q.new_empty(0, dtype=torch.float32) if decay is None else empty(decay)
    return (*map(empty, (q, k, v, beta)), d_decay, *map(empty, (ridge, gram, cross, log)))


_ridge_memory_gradient = define(
    f"ridge_memory_gradient(Tensor d_out, Tensor d_gram, Tensor d_cross, Tensor d_log_decay, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _check_gradient,
    lambda d_out, d_gram, d_cross, d_log_decay, *arguments: _canonical(*arguments),
    fake=_gradient_fake,
)


class RidgeReadouts(torch.autograd.Function):
    """Readouts [B, T, H, V]; gram, cross and log_decay after each sequence. Only what came in is saved."""

    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments[:-1])
        ctx.ridge_decays = arguments[-1]
        return _ridge_memory(*arguments)

    @backward
    def backward(ctx, *gradients: Tensor):
        saved = ctx.saved_tensors
        found = _ridge_memory_gradient(*(g.contiguous() for g in gradients), *saved, ctx.ridge_decays)
        d_decay = None if saved[4] is None else found[4]
        return *found[:4], d_decay, *found[5:], None, None


def ridge_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    decay: Tensor | None = None,
    ridge: float | Tensor = 1e-3,
    initial_state: RidgeState | None = None,
    cu_seqlens: Tensor | None = None,
    ridge_decays: bool = False,
) -> tuple[Tensor, RidgeState]:
    """Read at every token the ridge regression from keys to values of all tokens so far.

    `oₜ = qₜ (Hₜ + Λ)⁻¹ Gₜ` with `Hₜ = γₜHₜ₋₁ + βₜkₜᵀkₜ` and `Gₜ = γₜGₜ₋₁ + βₜkₜᵀvₜ`: the least
    squares that linear attention and the delta rule take a step towards. Token t reads after its own write.
    Computed a chunk of tokens at a time in fp64. Differentiable; the backward pass computes the chunks again.

    Without a decay, or with one that the ridge shares (`ridge_decays`), each token changes `Hₜ + Λ` by rank
    one, and a chunk takes matrix products and two Cholesky factorisations. A constant ridge under a decay
    changes it by a full rank: one factorisation a token.

    Args:
        q: queries, [B, T, H, K], fp32, bf16, fp16 or fp64.
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        beta: the weight of each pair, [B, T, H], at least 0; 1 if None. 0 writes nothing.
        decay: log γ, [B, T, H], at most 0 for a memory that forgets; None forgets nothing.
        ridge: λ above 0, or the diagonal of Λ, [H, K].
        initial_state: what an earlier call returned: the sequences go on.
        cu_seqlens: where packed sequences begin and end, [N + 1], int64 or int32; then B is 1.
        ridge_decays: the ridge decays with the memory, `Λₜ = γₜΛₜ₋₁`. It is gone when the memory has been
            renewed often, and what keys have not spanned since has no bound.

    Returns:
        The readouts [B, T, H, V] in v's type, and the state after each sequence in fp64.

    Raises:
        ValueError: wrong shape, device or boundaries; an entry that is not finite; beta under 0; ridge not
            above 0.
        TypeError: wrong dtype.
        EngramError: `H + Λ` is singular as far as fp64 can tell.

    Example:
        >>> k = torch.nn.functional.normalize(torch.randn(2, 100, 4, 64), dim=-1)
        >>> v = torch.randn(2, 100, 4, 64)
        >>> readouts, state = ek.ridge_memory(k, k, v, ridge=1e-3)
        >>> readouts, state = ek.ridge_memory(k, k, v, ridge=1e-3, initial_state=state)

    Source: von Oswald et al. 2025 (MesaNet, arXiv 2506.05233), eq. 4, solved exactly; Wang et al. 2025
    (arXiv 2501.12352).
    """
    check_sequence(q, k, v, beta=beta, decay=decay)
    count, (heads, keys), values = sequences(q, cu_seqlens), q.shape[2:], v.shape[-1]
    if not isinstance(ridge, Tensor):
        check.number("ridge", ridge, above=0)
        ridge = torch.full((heads, keys), ridge, dtype=torch.float64, device=q.device)
    if initial_state is None:
        empty = torch.zeros(count, heads, keys, keys + values, dtype=torch.float64, device=q.device)
        initial_state = RidgeState(empty[..., :keys], empty[..., keys:], empty[..., 0, 0])
    is_state = isinstance(initial_state, tuple) and len(initial_state) == 3
    got = type(initial_state).__name__
    check.expect(is_state, "initial_state", "a RidgeState", got, TypeError)
    if beta is None:
        beta = torch.ones(q.shape[:3], dtype=torch.float32, device=q.device)
    _check(q, k, v, beta, decay, ridge, *initial_state, cu_seqlens, ridge_decays)
    state = (tensor.double() for tensor in initial_state)
    out, *after = RidgeReadouts.apply(q, k, v, beta, decay, ridge, *state, cu_seqlens, bool(ridge_decays))
    return out, RidgeState(*after)


def ridge_forget(state: RidgeState, k: Tensor, v: Tensor, weight: Tensor | float = 1.0) -> RidgeState:
    """Take pairs out of a state, as if they had never been written: `H − Σ w kᵀk`, `G − Σ w kᵀv`.

    Exact but for fp64's rounding, and in any order: the sums do not know it.

    Args:
        state: of N sequences and H heads.
        k: the keys that were written, [N, n, H, K].
        v: their values, [N, n, H, V].
        weight: what is left of each write, `βₜ` times the decay since, [N, n, H] or one number.

    Returns:
        The state without them.

    Raises:
        ValueError: wrong shape or device; an entry that is not finite; a pair that the state does not hold,
            as far as the diagonal of H says.
        TypeError: wrong dtype.

    Example:
        >>> _, state = ek.ridge_memory(k, k, v)
        >>> state = ek.ridge_forget(state, k[:, 3:4], v[:, 3:4])
    """
    check_sequence(k, k, v)
    count, heads = state.gram.shape[:2]
    check.shape("k", k, (count, k.shape[1], heads, state.gram.shape[-1]), "[N, n, H, K]")
    _check_state(count, k, v, *state)
    if not isinstance(weight, Tensor):
        check.number("weight", weight)
        weight = torch.full(k.shape[:3], weight, dtype=torch.float64, device=k.device)
    check_sequence(k, k, v, weight=weight)
    for name, tensor in (("k", k), ("v", v), ("weight", weight)):
        check.finite(name, tensor)
    keys, values = k.double().transpose(1, 2), v.double().transpose(1, 2)
    weighted = (keys * weight.double().transpose(1, 2).unsqueeze(-1)).mT
    gram, cross = state.gram.double() - weighted @ keys, state.cross.double() - weighted @ values
    held = state.gram.diagonal(dim1=-2, dim2=-1)
    rounding = 1e-9 * held.abs().amax(-1, keepdim=True)
    sound = bool((gram.diagonal(dim1=-2, dim2=-1) >= -rounding).all())
    check.expect(sound, "k", "pairs that the state holds", "some that take more out of H than it has")
    return RidgeState(gram, cross, state.log_decay)
