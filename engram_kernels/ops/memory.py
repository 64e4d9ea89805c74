"""Episodic memory: address, write, solve, forget, read."""

import math

import torch
from torch import Tensor

from .. import _checks as check
from ..errors import EngramError
from .batching import folded
from .define import apply, backward, define
from .memory_state import (
    check_boundaries,
    check_boundary_values,
    check_rows,
    check_state,
    flat,
    flat_view,
    singular,
    wrong_boundaries,
)

__all__ = ["memory_accumulate_", "memory_address", "memory_forget_", "memory_read", "memory_solve"]


def _check_ragged(A: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        check.expect(A.dim() == 3, "A", "shape [batch, K, K] with cu_seqlens", list(A.shape))
        check_boundaries(A.shape[0], cu_seqlens, A.device)


# -- memory_address, memory_read: products, which are the library's ------------------------------------------


def memory_address(z: Tensor, m0_pinv: Tensor) -> Tensor:
    """Return the addressing weights of latents: `w = z M0⁺`.

    Differentiable.

    Args:
        z: latents, [..., N, C], fp32, bf16, fp16 or fp64.
        m0_pinv: M0⁺, the pseudo-inverse of the fixed addressing matrix, [C, K] for all or [..., C, K].

    Returns:
        w, [..., N, K], computed in the type of M0⁺.

    Raises:
        ValueError: wrong shape or device.
        TypeError: wrong dtype.

    Example:
        >>> w = ek.memory_address(z, ek.pseudo_inverse(m0))

    Source: Das et al. 2024 (arXiv 2403.11901), section 3.
    """
    check.floating("z", z)
    check.floating("m0_pinv", m0_pinv)
    check.expect(z.dim() >= 2, "z", "shape [..., N, C]", list(z.shape))
    check.expect(m0_pinv.dim() >= 2, "m0_pinv", "shape [C, K] or [..., C, K]", list(m0_pinv.shape))
    leading = () if m0_pinv.dim() == 2 else z.shape[:-2]
    expected = (*leading, z.shape[-1], m0_pinv.shape[-1])
    check.shape("m0_pinv", m0_pinv, expected, "[C, K], or with the leading dimensions of z")
    check.same_device("m0_pinv", m0_pinv, z.device)
    with torch.autocast(z.device.type, enabled=False):
        return z.to(m0_pinv.dtype) @ m0_pinv


def memory_read(z: Tensor, M_pinv: Tensor, M: Tensor) -> Tensor:
    """Return the readout of latents, their projection on what the memory spans: `w = z M⁺`, `w M`.

    Differentiable.

    Args:
        z: latents, [..., N, C], fp32, bf16, fp16 or fp64.
        M_pinv: M⁺, [..., C, K], any floating type, such as `pseudo_inverse(M)`.
        M: the memory, [..., K, C], in the type of M⁺, which is computed in.

    Returns:
        The readout, [..., N, C], in the type of z.

    Raises:
        ValueError: wrong shape or device.
        TypeError: wrong dtype.

    Example:
        >>> readout = ek.memory_read(z, ek.pseudo_inverse(M), M)

    Source: Das et al. 2024 (arXiv 2403.11901), section 3.
    """
    check.floating("z", z)
    check.floating("M_pinv", M_pinv)
    check.floating("M", M, (M_pinv.dtype,))
    check.expect(z.dim() >= 2, "z", "shape [..., N, C]", list(z.shape))
    check.expect(M.dim() >= 2, "M", "shape [..., K, C]", list(M.shape))
    leading, slots, latent = z.shape[:-2], M.shape[-2], z.shape[-1]
    check.shape("M", M, (*leading, slots, latent), "[..., K, C]")
    check.shape("M_pinv", M_pinv, (*leading, latent, slots), "[..., C, K]")
    check.same_device("M_pinv", M_pinv, z.device)
    check.same_device("M", M, z.device)
    with torch.autocast(z.device.type, enabled=False):
        return (z.to(M.dtype) @ M_pinv @ M).to(z.dtype)


# -- memory_accumulate_ --------------------------------------------------------------------------------------


def _check_accumulate(
    A: Tensor, B: Tensor, w: Tensor, z: Tensor, alpha: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    check_state("A", A, "B", B)
    _check_ragged(A, cu_seqlens)
    check_rows(A, B, w, z, ragged=cu_seqlens is not None)
    if alpha is not None:
        check.expect(isinstance(alpha, Tensor), "alpha", "a tensor", type(alpha).__name__, TypeError)
        check.expect(not alpha.is_complex(), "alpha", "a tensor of real numbers", alpha.dtype, TypeError)
        check.shape("alpha", alpha, w.shape[:-1], "one entry a row of w")
        check.same_device("alpha", alpha, A.device)
    check.no_overlap("A", A)
    check.no_overlap("B", B)


def _canonical_accumulate(
    A: Tensor, B: Tensor, w: Tensor, z: Tensor, alpha: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    check.dimensions("A", A, "[B, K, K]")
    if alpha is not None:
        check.floating("alpha", alpha, (A.dtype,))


def _accumulate_apart(
    A: Tensor, B: Tensor, w: Tensor, z: Tensor, alpha: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    apart = B.numel() == 0 or B.data_ptr() != A.data_ptr()
    check.expect(apart, "B", "memory of its own", "the memory of A")
    for written in (A, B):
        check.own_memory(written, w=w, z=z)


def _accumulate_values(
    A: Tensor, B: Tensor, w: Tensor, z: Tensor, alpha: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    check_boundary_values(cu_seqlens, w)
    _product_values(A.dtype, alpha, w=w, z=z)


def _product_values(dtype: torch.dtype, alpha: Tensor | None, **rows: Tensor) -> None:
    """Check that rows are finite, and that sums of their products fit the state's type."""
    # By Cauchy and Schwarz no entry of Σ αᵢ wᵢᵀzᵢ exceeds max|α| ‖w‖ ‖z‖; a NaN shows in the norm too.
    norms = {
        name: torch.linalg.vector_norm(tensor, dtype=torch.float64).item() for name, tensor in rows.items()
    }
    factor = 1.0
    if alpha is not None and alpha.numel():
        check.finite("alpha", alpha)
        factor = alpha.abs().max().item()
    largest = torch.finfo(dtype).max
    for name, norm in norms.items():
        if not factor * norms["w"] * norm <= largest:
            for culprit, tensor in rows.items():
                check.finite(culprit, tensor)
            size = f"norms of {' and '.join(f'{value:.1e}' for value in norms.values())}"
            raise ValueError(
                f"{name}: expected rows whose products with w fit {str(dtype)[6:]}, got {size} of all rows"
            )


def _accumulate_guard(
    A: Tensor, B: Tensor, w: Tensor, z: Tensor, alpha: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, tuple]:
    own, other = (torch.linalg.vector_norm(rows, dtype=torch.float64) for rows in (w, z))
    products = own * torch.maximum(own, other)
    if alpha is not None and alpha.numel():
        products = products * alpha.abs().amax()
    bad = (products <= torch.finfo(A.dtype).max).logical_not_()
    if cu_seqlens is not None:
        bad |= wrong_boundaries(cu_seqlens, w.shape[0])
        cu_seqlens = cu_seqlens.masked_fill(bad, 0)
    alpha = None if alpha is None else alpha.masked_fill(bad, 0)
    return bad, (A, B, w.masked_fill(bad, 0), z.masked_fill(bad, 0), alpha, cu_seqlens)


_memory_accumulate_ = define(
    "memory_accumulate_(Tensor(a!) gram, Tensor(b!) cross, Tensor weights, Tensor latents, Tensor? alpha, "
    "Tensor? cu_seqlens) -> ()",
    _check_accumulate,
    _canonical_accumulate,
    fake=lambda gram, cross, weights, latents, alpha, cu_seqlens: None,
    apart=_accumulate_apart,
    values=_accumulate_values,
    guard=_accumulate_guard,
    complaint="memory_accumulate_: expected finite rows whose products fit the state, and boundaries as "
    "cu_seqlens, got others; the memory is unchanged",
)


def memory_accumulate_(
    A: Tensor,
    B: Tensor,
    w: Tensor,
    z: Tensor,
    alpha: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write rows into a memory in place, or take them out: `A += Σ αᵢ wᵢᵀwᵢ`, `B += Σ αᵢ wᵢᵀzᵢ`.

    The memory is `M = A⁻¹B`. The order of the rows does not matter, so N sequential writes are one call. Not
    recorded by autograd. To take rows out with a guard: `memory_forget_`.

    Args:
        A: [..., K, K], fp64 or fp32, changed in place. Sums are taken in its type.
        B: [..., K, C], of the same type, changed in place.
        w: addressing weights, [..., N, K], or [T, K] with cu_seqlens; fp32, bf16, fp16 or fp64.
        z: latents, [..., N, C], or [T, C] with cu_seqlens; fp32, bf16, fp16 or fp64.
        alpha: α, [..., N] or [T], any real type: 1 writes, −1 forgets, 0 leaves a row out. Default: 1.
        cu_seqlens: [batch + 1], int64 or int32: rows cu_seqlens[b] to cu_seqlens[b + 1] of all T go into
            memory b of A [batch, K, K]. Starts with 0, ends with T and does not fall.

    Returns:
        A and B.

    Raises:
        ValueError: wrong shape or device, cu_seqlens that are no boundaries, rows (of any α) that are not
            finite or whose products overflow, or a state whose elements overlap; nothing is changed.
        TypeError: wrong dtype.

    Example:
        >>> A, B = torch.zeros(K, K, dtype=torch.float64), torch.zeros(K, C, dtype=torch.float64)
        >>> ek.memory_accumulate_(A, B, w, z)
        >>> M = ek.memory_solve(A, B, ridge=1e-3)

    Source: Das et al. 2024 (arXiv 2403.11901), eq. 3 and 4, in information form.
    """
    _check_accumulate(A, B, w, z, alpha, cu_seqlens)
    w, z = w.detach(), z.detach()
    alpha = None if alpha is None else alpha.detach().to(A.dtype)
    if cu_seqlens is None:
        w, z = flat(w), flat(z)
        alpha = None if alpha is None else alpha.reshape(w.shape[:2])
    _memory_accumulate_(flat_view("A", A), flat_view("B", B), w, z, alpha, cu_seqlens)
    return A, B


# -- memory_solve --------------------------------------------------------------------------------------------


def _check_solve(A: Tensor, B: Tensor, ridge: float, finite: bool) -> None:
    check_state("A", A, "B", B)
    check.number("ridge", ridge, at_least=0)


def _solve_results(result: tuple[Tensor, Tensor], A: Tensor, B: Tensor, ridge: float, finite: bool) -> None:
    memory, info = result
    failed = info.nonzero().flatten().tolist()
    overflows = finite and not check.is_finite(memory)
    if failed or overflows:
        check.finite("A", A)
        check.finite("B", B)
    if failed:
        raise singular(failed[0], A.shape[0], ridge)
    if overflows:
        raise EngramError(
            f"B: expected a state whose memory fits {str(memory.dtype)[6:]}, got one that overflows it; "
            "give a larger ridge, or a state of float64"
        )


def _solve_suspect(result: tuple[Tensor, Tensor], A: Tensor, B: Tensor, ridge: float, finite: bool) -> Tensor:
    memory, info = result
    failed = (info != 0).any()
    return failed | check.not_finite(memory) if finite else failed


# `finite` says whether B must be; a gradient need not, and gives what it gives.
_memory_solve = define(
    "memory_solve(Tensor gram, Tensor cross, float ridge, bool finite) -> (Tensor, Tensor)",
    _check_solve,
    lambda A, B, ridge, finite: check.dimensions("A", A, "[B, K, K]"),
    fake=lambda gram, cross, ridge, finite: (
        torch.empty_like(cross, memory_format=torch.contiguous_format),
        gram.new_empty(gram.shape[0], dtype=torch.int32),
    ),
    batched=folded,
    results=_solve_results,
    suspect=_solve_suspect,
    complaint="memory_solve: expected a finite state that with its ridge is positive definite, got another",
)


class MemorySolve(torch.autograd.Function):
    """M = (A + λI)⁻¹B [B, K, C]; dB = (A + λI)⁻¹ g, dA = the symmetric part of −dB Mᵀ, as A counts by its."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
        return _memory_solve(gram, cross, ridge, True)[0]

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        gram, _, ctx.ridge = inputs
        ctx.save_for_backward(gram, output)

    @backward
    def backward(ctx, gradient: Tensor):
        gram, memory = ctx.saved_tensors
        d_cross, _ = _memory_solve(gram, gradient.contiguous(), ctx.ridge, False)
        d_gram = None
        if ctx.needs_input_grad[0]:
            d_gram = d_cross @ memory.mT
            d_gram = -(d_gram + d_gram.mT) / 2
        return d_gram, d_cross, None


def memory_solve(A: Tensor, B: Tensor, *, ridge: float = 0.0) -> Tensor:
    """Return the memory of an information form: `M = (A + λI)⁻¹ B`, by Cholesky, in A's type.

    Without a ridge fewer independent writes than slots leave A singular; and a least-squares memory of so few
    rows would answer forgotten ones as before. Differentiable.

    Args:
        A: [..., K, K], fp64 or fp32; its symmetric part is used.
        B: [..., K, C], of the same type.
        ridge: λ, absolute, added to the diagonal of A.

    Returns:
        M, [..., K, C], in A's type.

    Raises:
        ValueError: wrong shape, device or ridge; a state that is not finite.
        TypeError: wrong dtype.
        EngramError: `A + λI` is not positive definite, as far as its type can tell.

    Example:
        >>> M = ek.memory_solve(A, B, ridge=1e-3)

    Source: Das et al. 2024 (arXiv 2403.11901), eq. 3.
    """
    _check_solve(A, B, ridge, True)
    return apply(MemorySolve, flat(A), flat(B), float(ridge)).reshape(B.shape)


# -- memory_forget_: the leverages, then the write with α = −1 -----------------------------------------------


def _check_leverages(A: Tensor, w: Tensor, cu_seqlens: Tensor | None, ridge: float, limit: float) -> None:
    check_state("A", A)
    _check_ragged(A, cu_seqlens)
    check_rows(A, None, w, None, ragged=cu_seqlens is not None)
    check.number("ridge", ridge, at_least=0)


def _leverages_values(A: Tensor, w: Tensor, cu_seqlens: Tensor | None, ridge: float, limit: float) -> None:
    check_boundary_values(cu_seqlens, w)
    check.finite("w", w)


def _leverages_results(
    result: tuple[Tensor, Tensor, Tensor],
    A: Tensor,
    w: Tensor,
    cu_seqlens: Tensor | None,
    ridge: float,
    limit: float,
) -> None:
    _, largest, info = result
    failed = info.nonzero().flatten().tolist()
    if failed:
        check.finite("A", A)
        raise singular(failed[0], A.shape[0], ridge)
    if largest.numel() == 0:
        return
    worst = int(largest.argmax())
    if not largest[worst].item() < limit:
        where = f" in memory {worst}" if A.shape[0] > 1 else ""
        raise EngramError(
            f"w: expected rows that the memory holds, whose largest block leverage is below {limit:.9g}, got "
            f"{largest[worst].item():.9g}{where}; nothing was forgotten"
        )


_memory_leverages = define(
    "memory_leverages(Tensor gram, Tensor weights, Tensor? cu_seqlens, float ridge, float limit) "
    "-> (Tensor, Tensor, Tensor)",
    _check_leverages,
    lambda A, w, cu_seqlens, ridge, limit: check.dimensions("A", A, "[B, K, K]"),
    fake=lambda gram, weights, cu_seqlens, ridge, limit: (
        weights.new_empty(weights.shape[:-1], dtype=gram.dtype),
        gram.new_empty(gram.shape[0], dtype=torch.float64),
        gram.new_empty(gram.shape[0], dtype=torch.int32),
    ),
    values=_leverages_values,
    results=_leverages_results,
)


def memory_forget_(
    A: Tensor,
    B: Tensor,
    w: Tensor,
    z: Tensor,
    *,
    ridge: float = 0.0,
    tolerance: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Take rows out of a memory in place, if what is left stays sound: `A −= WᵀW`, `B −= WᵀZ`.

    The rows' block leverage is the largest eigenvalue of `H = W (A + λI)⁻¹ Wᵀ`. It is below 1 for rows that
    were written; at 1 `A + λI` would become singular, beyond it indefinite. Then nothing is changed, in any
    memory. The leverage does not prove that a row was written: only a ledger does. Not recorded by autograd.

    Args:
        A: [..., K, K], fp64 or fp32, changed in place.
        B: [..., K, C], of the same type, changed in place.
        w: addressing weights, [..., N, K], or [T, K] with cu_seqlens, exactly as they were written.
        z: latents, [..., N, C], or [T, C] with cu_seqlens, exactly as they were written.
        ridge: λ, absolute, that A lacks: 0 if A holds its ridge.
        tolerance: how far the block leverage must stay below 1. Default: the root of the spacing of A's type
            at 1. The state that is left has lost the digits that the forgotten rows drowned, about
            −log₁₀(1 − leverage) of them.
        cu_seqlens: as for `memory_accumulate_`.

    Returns:
        The leverage `w (A + λI)⁻¹ wᵀ` of each row before, [..., N] or [T], in A's type.

    Raises:
        ValueError: wrong shape, device, ridge, tolerance or cu_seqlens; rows that are not finite.
        TypeError: wrong dtype.
        EngramError: the block leverage is not below 1 − tolerance: the rows are not in the memory, or not all
            of them; or `A + λI` is not positive definite.

    Example:
        >>> ek.memory_accumulate_(A, B, w, z)
        >>> ek.memory_forget_(A, B, w[3:5], z[3:5], ridge=1e-3)

    Source: Das et al. 2024 (arXiv 2403.11901), eq. 4 with α = −1; the guard is this package's own.
    """
    _check_accumulate(A, B, w, z, None, cu_seqlens)
    if tolerance is None:
        tolerance = math.sqrt(torch.finfo(A.dtype).eps)
    check.number("ridge", ridge, at_least=0)
    check.number("tolerance", tolerance, at_least=0)
    check.expect(tolerance < 1, "tolerance", "a number below 1", tolerance)
    gram, cross, rows, latents = flat_view("A", A), flat_view("B", B), w.detach(), z.detach()
    if cu_seqlens is None:
        rows, latents = flat(rows), flat(latents)
    limit = 1 - float(tolerance)
    leverages, _, _ = _memory_leverages(gram, rows, cu_seqlens, float(ridge), limit)
    minus = torch.full(rows.shape[:-1], -1.0, dtype=A.dtype, device=A.device)
    _memory_accumulate_(gram, cross, rows, latents, minus, cu_seqlens)
    return leverages.reshape(w.shape[:-1])
