"""Episodic memory: writes one after the other, with a readout after each."""

import torch
from torch import Tensor

from .. import _checks as check
from ..errors import EngramError
from .batching import folded
from .define import apply, backward, define
from .memory_state import check_rows, check_state, flat

__all__ = ["memory_stream"]


def _check_stream(P: Tensor, M: Tensor, w: Tensor, z: Tensor) -> None:
    check_state("P", P, "M", M)
    check_rows(P, M, w, z, ragged=False)


def _canonical_stream(P: Tensor, M: Tensor, w: Tensor, z: Tensor) -> None:
    check.dimensions("P", P, "[B, K, K]")
    for name, tensor in (("w", w), ("z", z)):
        check.floating(name, tensor, (P.dtype,))


def _stream_results(
    result: tuple[Tensor, Tensor, Tensor, Tensor], P: Tensor, M: Tensor, w: Tensor, z: Tensor
) -> None:
    # A state that is not finite or not positive definite shows in the rows, which are small beside it.
    _, _, readouts, leverages = result
    if check.is_finite(readouts) and check.is_finite(leverages) and not bool((leverages > 1).any()):
        return
    for name, tensor in (("P", P), ("M", M), ("w", w), ("z", z)):
        check.finite(name, tensor)
    raise EngramError(
        "P: expected a positive definite matrix and rows that its type can take, got one for which "
        "1 + w P wᵀ is not positive, or overflows, for a row"
    )


def _stream_fake(
    precision_inverse: Tensor, memory: Tensor, weights: Tensor, latents: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(precision_inverse, memory_format=torch.contiguous_format),
        torch.empty_like(memory, memory_format=torch.contiguous_format),
        torch.empty_like(latents, memory_format=torch.contiguous_format),
        weights.new_empty(weights.shape[:-1]),
    )


_memory_stream = define(
    "memory_stream(Tensor precision_inverse, Tensor memory, Tensor weights, Tensor latents) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _check_stream,
    _canonical_stream,
    fake=_stream_fake,
    batched=folded,
    results=_stream_results,
    suspect=lambda result, *args: check.not_finite(*result[2:]) | (result[3] > 1).any(),
    complaint="memory_stream: expected a finite state with a positive definite P, and rows that its type can "
    "take, got others",
)


def _check_gradient(P: Tensor, M: Tensor, w: Tensor, z: Tensor, *gradients: Tensor) -> None:
    _check_stream(P, M, w, z)
    outputs = ("P", P.shape), ("M", M.shape), ("readouts", z.shape), ("leverages", w.shape[:-1])
    for (name, shape), gradient in zip(outputs, gradients, strict=True):
        check.floating(f"d_{name}", gradient, (P.dtype,))
        check.shape(f"d_{name}", gradient, shape, "as the output it belongs to")
        check.same_device(f"d_{name}", gradient, P.device)


_memory_stream_gradient = define(
    "memory_stream_gradient(Tensor precision_inverse, Tensor memory, Tensor weights, Tensor latents, "
    "Tensor d_precision_inverse, Tensor d_memory, Tensor d_readouts, Tensor d_leverages) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _check_gradient,
    lambda P, M, w, z, *gradients: _canonical_stream(P, M, w, z),
    fake=lambda precision_inverse, memory, weights, latents, *gradients: tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (precision_inverse, memory, weights, latents)
    ),
    batched=folded,
)


class MemoryStream(torch.autograd.Function):
    """N sequential writes: P, M after the last, readouts [B, N, C] and leverages [B, N] after each."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        precision_inverse: Tensor, memory: Tensor, weights: Tensor, latents: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _memory_stream(precision_inverse, memory, weights, latents)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)

    @backward
    def backward(ctx, *gradients: Tensor):
        return _memory_stream_gradient(*ctx.saved_tensors, *(g.contiguous() for g in gradients))


def memory_stream(P: Tensor, M: Tensor, w: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write rows one after the other, and return what each reads at its own address after its write.

    For every row in turn, with `u = P wᵀ` and `g = w u`: `P −= u uᵀ/(1 + g)`, `M += u (z − w M)/(1 + g)`; the
    readout is then `w M`, and the leverage `w P wᵀ = g/(1 + g)`. Computed a block of rows at a time, which is
    the same: recursive least squares. Differentiable; the backward pass computes the writes again.

    Args:
        P: A⁻¹, [..., K, K], symmetric and positive definite, fp64 or fp32: `I/λ` for a memory that is empty.
        M: the memory, [..., K, C], of the same type.
        w: addressing weights, [..., N, K], fp32, bf16, fp16 or fp64.
        z: latents, [..., N, C], fp32, bf16, fp16 or fp64.

    Returns:
        P and M after the last write, as new tensors; the readouts [..., N, C]; the leverages [..., N], in
        [0, 1) but for rounding. All in P's type.

    Raises:
        ValueError: wrong shape or device; a state or row that is not finite.
        TypeError: wrong dtype.
        EngramError: P is not positive definite.

    Example:
        >>> P, M = torch.eye(K) / ridge, torch.zeros(K, C)
        >>> P, M, readouts, leverages = ek.memory_stream(P, M, w, z)

    Source: Das et al. 2024 (arXiv 2403.11901), eq. 3 and 4, with A⁻¹ by Sherman, Morrison and Woodbury.
    """
    _check_stream(P, M, w, z)
    w, z = w.to(P.dtype), z.to(P.dtype)
    arguments = (flat(tensor).contiguous() for tensor in (P, M, w, z))
    P_after, M_after, readouts, leverages = apply(MemoryStream, *arguments)
    return (
        P_after.reshape(P.shape),
        M_after.reshape(M.shape),
        readouts.reshape(z.shape),
        leverages.reshape(w.shape[:-1]),
    )
