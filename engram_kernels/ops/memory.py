"""Episodic memory."""

import math

import torch
from torch import Tensor

from .. import _checks as check
from .. import autograd
from .._ops import compute_dtype, ops
from .._ops.memory import check_boundaries, check_rows, check_state

METHODS = ("cholesky", "ben-israel")


def pseudo_inverse(
    a: Tensor, ridge: float | None = None, method: str = "cholesky", steps: int = 15
) -> Tensor:
    """Return the pseudo-inverse of a matrix, or of each of a batch.

    - "cholesky": `A⁺ = (AᵀA + λI)⁻¹Aᵀ`, and for a wide matrix `Aᵀ(AAᵀ + λI)⁻¹`, in fp64 whatever the matrix's
      type: singular values σ are inverted as `σ/(σ² + λ)`, so those under √λ are cut off softly.
    - "ben-israel": `X₀ = 5·10⁻⁴ Aᵀ`, then `steps` times `X ← 2X − XAX`, in fp32 (fp64 for an fp64 matrix), as
      Larimar has it. It diverges where a singular value exceeds 63, and has not converged for those under
      about 0.5 after 15 steps; neither is noticed. For comparison with Larimar only.

    Differentiable; λ counts as a constant.

    Args:
        a: A, [..., m, n], fp32, bf16, fp16 or fp64.
        ridge: λ, absolute, of the method "cholesky". None: relative to the trace of AᵀA,
            `max(16 ε²/min(m, n), 2 min(m, n) 2⁻⁵²)` of it, ε the spacing of A's type at 1: the projection
            `A A⁺` keeps at most about a hundredth of directions that only rounding made.
        method: "cholesky" or "ben-israel".
        steps: of the method "ben-israel".

    Returns:
        A⁺, [..., n, m], in A's type.

    Raises:
        ValueError: wrong shape, ridge, method or steps; a matrix that is not finite, or whose squares
            overflow ("cholesky").
        TypeError: wrong dtype.
        EngramError: a matrix that has not full rank, with too small a ridge ("cholesky").

    Example:
        >>> m0_pinv = ek.pseudo_inverse(m0)

    Source: Pham et al. 2022 (Generative Pseudo-inverse Memory); Ben-Israel and Cohen 1966; Das et al. 2024
        (arXiv 2403.11901), section 3.
    """
    check.floating("a", a)
    check.expect(a.dim() >= 2, "a", "shape [..., m, n]", list(a.shape))
    check.expect(method in METHODS, "method", f"one of {', '.join(METHODS)}", repr(method))
    check.integer("steps", steps)
    check.expect(steps >= 0, "steps", "at least 0", steps)
    if ridge is not None:
        check.number("ridge", ridge, at_least=0)
    if method == "ben-israel":
        check.expect(ridge is None, "ridge", "None with method 'ben-israel'", ridge)
        return _ben_israel(a, steps)
    rows, columns = a.shape[-2:]
    smaller = max(1, min(rows, columns))
    # A matrix of rounding errors has singular values up to about 0.4 ε ‖A‖ / √smaller: √λ is ten times that.
    # The other term is what the Cholesky factorisation of a singular Gram matrix needs.
    relative = max(16 * torch.finfo(a.dtype).eps ** 2 / smaller, 2 * smaller * torch.finfo(torch.float64).eps)
    ridge = None if ridge is None else float(ridge)
    tall = _flat((a if rows >= columns else a.mT).double())
    with torch.autocast(a.device.type, enabled=False):
        inverse = autograd.PseudoInverse.apply(tall, ridge, relative)
    inverse = inverse if rows >= columns else inverse.mT
    return inverse.reshape(*a.shape[:-2], columns, rows).to(a.dtype)


def _ben_israel(a: Tensor, steps: int) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):
        wide = a.to(compute_dtype(a))
        inverse = 5e-4 * wide.mT
        for _ in range(steps):
            inverse = 2 * inverse - inverse @ wide @ inverse
    return inverse.to(a.dtype)


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
    check_state("AB", A, B)
    _check_ragged(A, cu_seqlens)
    check_rows(A, B, w, z, ragged=cu_seqlens is not None)
    if alpha is not None:
        check.expect(isinstance(alpha, Tensor), "alpha", "a tensor", type(alpha).__name__, TypeError)
        check.expect(not alpha.is_complex(), "alpha", "a tensor of real numbers", alpha.dtype, TypeError)
        check.shape("alpha", alpha, w.shape[:-1], "one entry a row of w")
        alpha = alpha.detach().to(A.dtype)
    w, z = w.detach(), z.detach()
    if cu_seqlens is None:
        w, z = _flat(w), _flat(z)
        alpha = None if alpha is None else alpha.reshape(w.shape[:2])
    ops.memory_accumulate_(_flat_view("A", A), _flat_view("B", B), w, z, alpha, cu_seqlens)
    return A, B


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
    check_state("AB", A, B)
    check.number("ridge", ridge, at_least=0)
    return autograd.MemorySolve.apply(_flat(A), _flat(B), float(ridge)).reshape(B.shape)


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
    check_state("PM", P, M)
    check_rows(P, M, w, z, ragged=False)
    w, z = w.to(P.dtype), z.to(P.dtype)
    arguments = (_flat(tensor).contiguous() for tensor in (P, M, w, z))
    P_after, M_after, readouts, leverages = autograd.MemoryStream.apply(*arguments)
    return (
        P_after.reshape(P.shape),
        M_after.reshape(M.shape),
        readouts.reshape(z.shape),
        leverages.reshape(w.shape[:-1]),
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
    check_state("AB", A, B)
    _check_ragged(A, cu_seqlens)
    check_rows(A, B, w, z, ragged=cu_seqlens is not None)
    check.number("ridge", ridge, at_least=0)
    if tolerance is None:
        tolerance = math.sqrt(torch.finfo(A.dtype).eps)
    check.number("tolerance", tolerance, at_least=0)
    check.expect(tolerance < 1, "tolerance", "a number below 1", tolerance)
    rows = w.detach() if cu_seqlens is not None else _flat(w.detach())
    gram = _flat_view("A", A)
    leverages, _, _ = ops.memory_leverages(gram, rows, cu_seqlens, float(ridge), 1 - float(tolerance))
    minus = torch.full(w.shape[:-1], -1.0, dtype=A.dtype, device=A.device)
    memory_accumulate_(A, B, w, z, minus, cu_seqlens=cu_seqlens)
    return leverages.reshape(w.shape[:-1])


def _check_ragged(A: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        check.expect(A.dim() == 3, "A", "shape [batch, K, K] with cu_seqlens", list(A.shape))
        check_boundaries(A.shape[0], cu_seqlens, A.device)


def _flat(tensor: Tensor) -> Tensor:
    """One leading dimension in place of all, [B, rows, columns]."""
    return tensor.reshape(math.prod(tensor.shape[:-2]), *tensor.shape[-2:])


def _flat_view(name: str, tensor: Tensor) -> Tensor:
    """The same without a copy, for a tensor that is written."""
    leading = tensor.shape[:-2]
    if len(leading) < 2:
        return _flat(tensor.detach())
    merges = all(
        tensor.stride(i) == tensor.stride(i + 1) * tensor.shape[i + 1] for i in range(len(leading) - 1)
    )
    check.expect(merges, name, "leading dimensions that lie in one row", f"strides {tensor.stride()}")
    return tensor.detach().view(math.prod(leading), *tensor.shape[-2:])
