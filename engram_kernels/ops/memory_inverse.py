"""The pseudo-inverse."""

import math

import torch
from torch import Tensor

from .. import _checks as check
from .._linalg import compute_dtype
from ..errors import EngramError
from .batching import folded
from .define import apply, backward, define
from .memory_state import flat

__all__ = ["pseudo_inverse"]

METHODS = ("cholesky", "ben-israel")


def _check(a: Tensor, ridge: float | None, *computed: float) -> None:
    check.floating("a", a)
    check.expect(a.dim() >= 2, "a", "shape [..., m, n]", list(a.shape))
    if ridge is not None:
        check.number("ridge", ridge, at_least=0)


def _canonical(a: Tensor, ridge: float | None, relative: float, largest: float) -> None:
    check.floating("a", a, (torch.float64,))
    check.dimensions("a", a, "[B, m, n]")
    check.expect(a.shape[-2] >= a.shape[-1], "a", "at least as many rows as columns", list(a.shape))


def _results(
    result: tuple[Tensor, Tensor, Tensor], a: Tensor, ridge: float | None, relative: float, largest: float
) -> None:
    inverse, _, info = result
    failed = info.nonzero().flatten().tolist()
    if not failed and check.is_finite(inverse):
        size = inverse.abs().max().item() if inverse.numel() else 0.0
        if size > largest:
            raise EngramError(
                f"a: expected a matrix whose pseudo-inverse fits its type, up to {largest:.3g}, got one with "
                f"entries up to {size:.3g}; give it in a wider type"
            )
        return
    check.finite("a", a)
    entries = a.abs().max().item()
    sizes = math.sqrt(torch.finfo(torch.float64).tiny) < entries < math.sqrt(torch.finfo(torch.float64).max)
    check.expect(
        sizes or entries == 0, "a", "entries whose squares fit float64", f"entries up to {entries:.1e}"
    )
    where = f" matrix {failed[0]}" if failed and a.shape[0] > 1 else " one"
    raise EngramError(
        f"a: expected a matrix of full rank, got{where} without it and ridge {ridge or 0:g}; give a larger "
        "ridge, or None"
    )


def _suspect(
    result: tuple[Tensor, Tensor, Tensor], a: Tensor, ridge: float | None, relative: float, largest: float
) -> Tensor:
    inverse, _, info = result
    fits = (inverse.abs() <= largest).all()  # not where it is NaN
    return (info != 0).any() | fits.logical_not_()


# `largest` is what the caller's type can hold: the pseudo-inverse is rounded to it afterwards.
_pseudo_inverse = define(
    "pseudo_inverse(Tensor a, float? ridge, float relative, float largest) -> (Tensor, Tensor, Tensor)",
    _check,
    _canonical,
    fake=lambda a, ridge, relative, largest: (
        a.new_empty(a.shape[0], a.shape[2], a.shape[1]),
        a.new_empty(a.shape[0], a.shape[2], a.shape[2]),
        a.new_empty(a.shape[0], dtype=torch.int32),
    ),
    batched=folded,
    results=_results,
    suspect=_suspect,
    complaint="pseudo_inverse: expected a finite matrix whose pseudo-inverse fits its type, of full rank "
    "with its ridge, got another",
)


class PseudoInverse(torch.autograd.Function):
    """X = (AᵀA + λI)⁻¹Aᵀ [B, n, m] of a tall A; with S = (AᵀA + λI)⁻¹, dA = (I − A X) gᵀ S − Xᵀ g Xᵀ."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, ridge: float | None, relative: float, largest: float) -> tuple[Tensor, Tensor]:
        return _pseudo_inverse(a, ridge, relative, largest)[:2]

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        inverse, factor = output
        ctx.mark_non_differentiable(factor)
        ctx.save_for_backward(inputs[0], inverse, factor)

    @backward
    def backward(ctx, gradient: Tensor, _d_factor: Tensor):
        a, inverse, factor = ctx.saved_tensors
        solved = torch.cholesky_solve(gradient, factor).mT
        return solved - a @ (inverse @ solved) - inverse.mT @ (gradient @ inverse.mT), None, None, None


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
        EngramError: a matrix that has not full rank, with too small a ridge, or whose pseudo-inverse does not
            fit its type ("cholesky").

    Example:
        >>> m0_pinv = ek.pseudo_inverse(m0)

    Source: Pham et al. 2022 (Generative Pseudo-inverse Memory); Ben-Israel and Cohen 1966; Das et al. 2024
        (arXiv 2403.11901), section 3.
    """
    _check(a, ridge)
    check.expect(method in METHODS, "method", f"one of {', '.join(METHODS)}", repr(method))
    check.integer("steps", steps)
    check.expect(steps >= 0, "steps", "at least 0", steps)
    if method == "ben-israel":
        check.expect(ridge is None, "ridge", "None with method 'ben-israel'", ridge)
        return _ben_israel(a, steps)
    rows, columns = a.shape[-2:]
    smaller = max(1, min(rows, columns))
    # A matrix of rounding errors has singular values up to about 0.4 ε ‖A‖ / √smaller: √λ is ten times that.
    # The other term is what the Cholesky factorisation of a singular Gram matrix needs.
    relative = max(16 * torch.finfo(a.dtype).eps ** 2 / smaller, 2 * smaller * torch.finfo(torch.float64).eps)
    ridge, largest = None if ridge is None else float(ridge), torch.finfo(a.dtype).max
    tall = flat((a if rows >= columns else a.mT).double())
    with torch.autocast(a.device.type, enabled=False):
        inverse, _ = apply(PseudoInverse, tall, ridge, relative, largest)
    inverse = inverse if rows >= columns else inverse.mT
    return inverse.reshape(*a.shape[:-2], columns, rows).to(a.dtype)


def _ben_israel(a: Tensor, steps: int) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):
        wide = a.to(compute_dtype(a))
        inverse = 5e-4 * wide.mT
        for _ in range(steps):
            inverse = 2 * inverse - inverse @ wide @ inverse
    return inverse.to(a.dtype)
