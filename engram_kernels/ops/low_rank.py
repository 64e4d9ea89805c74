"""The associative write."""

import torch
from torch import Tensor

from .. import _checks as check
from .. import autograd
from .._ops import compute_dtype, ops
from ..covariance import Covariance

MODES = ("joint", "sequential", "independent")


def low_rank_factors(
    weight: Tensor,
    keys: Tensor,
    values: Tensor,
    covariance: Covariance | Tensor,
    mode: str = "joint",
    ridge: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the factors of the associative write that makes a weight answer keys with values.

    With `E = V − K Wᵀ`, `P = K C⁻¹`, `G = P Kᵀ` the update is `ΔW = Eᵀ S P`, as two factors:

    - "joint": `S = (λI + G)⁻¹`. λ = 0 meets every constraint exactly (EMMET); λ > 0 is MEMIT with
      `mom2_update_weight = λ`, since `K (λC + KᵀK)⁻¹ = (λI + G)⁻¹ P`.
    - "sequential": n rank-one writes, one after the other in the order of the rows (ROME n times), as one
      unit-triangular solve: `u_j = P_j / G_jj`, `R = (I + stril(K Uᵀ))⁻¹ E`, `ΔW = Rᵀ U`.
    - "independent": each row's own rank-one write into the weight as it is, `S = diag(1/G_jj)`: for one key a
      matrix, batched over matrices (ROME).

    Differentiable in weight, keys and values.

    Args:
        weight: W, [out, in] or [B, out, in], fp32, bf16, fp16 or fp64.
        keys: K, [n, in] or [B, n, in], a key a row.
        values: V, [n, out] or [B, n, out], the output wanted for each key.
        covariance: C as a `Covariance`, or its inverse as a tensor [in, in] or [B, in, in].
        mode: "joint", "sequential" or "independent".
        ridge: λ of the joint mode, absolute; 0 for the others.

    Returns:
        left [out, n] and right [n, in] (with B in front where the weight has it), so that the edited weight
        is `weight + left @ right`. fp64 for an fp64 weight, else fp32; the n × n algebra is fp64 always.

    Raises:
        ValueError: wrong shape, device, mode or ridge; a key or value that is NaN or infinite; a zero key.
        TypeError: wrong dtype.
        EngramError: dependent keys without a ridge, or a covariance that is not positive definite.

    Example:
        >>> left, right = ek.low_rank_factors(weight, keys, values, covariance)
        >>> ek.apply_low_rank_(weight, left, right)

    Source: Meng et al. 2022 (arXiv 2202.05262), eq. 2; Meng et al. 2023 (arXiv 2210.07229), eq. 14; Gupta et
        al. 2024 (arXiv 2403.14236), EMMET.
    """
    batched = _check_write(weight, keys, values, covariance, mode, ridge)
    if not batched:
        weight, keys, values = weight.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0)
    dtype = compute_dtype(weight)
    keys, values = keys.to(dtype), values.to(dtype)
    with torch.autocast(weight.device.type, enabled=False):
        preconditioned = _precondition(keys, covariance)
        residual, gram = autograd.ResidualGram.apply(weight, keys, values, preconditioned)
        energy = gram.diagonal(dim1=-2, dim2=-1)
        if mode == "joint":
            identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
            system = (gram + gram.mT) / 2 + ridge * identity
            coefficients = autograd.SmallSolve.apply(system, residual, "cholesky")
            right = preconditioned
        elif mode == "sequential":
            system = gram / energy.unsqueeze(-2)
            coefficients = autograd.SmallSolve.apply(system, residual, "unit_lower")
            right = preconditioned / energy.unsqueeze(-1)
        else:
            coefficients = residual
            right = preconditioned / energy.unsqueeze(-1)
        left, right = coefficients.mT, right.to(dtype)
    return (left, right) if batched else (left[0], right[0])


def low_rank_update(
    weight: Tensor,
    keys: Tensor,
    values: Tensor,
    covariance: Covariance | Tensor,
    mode: str = "joint",
    ridge: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """Return the weight with keys and values written into it: `W + η · left @ right` of `low_rank_factors`.

    Differentiable in weight, keys and values.

    Args:
        weight, keys, values, covariance, mode, ridge: as for `low_rank_factors`.
        scale: η, the strength of the write. 1 is exact; 0 leaves the weight; −1 after a write takes it back,
            up to rounding.

    Returns:
        The edited weight: a new tensor of the weight's shape and dtype, rounded once.

    Raises:
        ValueError, TypeError, EngramError: as for `low_rank_factors`.

    Example:
        >>> edited = ek.low_rank_update(weight, key[None], value[None], covariance)
        >>> torch.allclose(key @ edited.T, value, atol=1e-5)
        True

    Source: Meng et al. 2022 (arXiv 2202.05262), eq. 2.
    """
    check.floating("weight", weight)
    _check_scale(scale, compute_dtype(weight))
    left, right = low_rank_factors(weight, keys, values, covariance, mode, ridge)
    if weight.dim() == 3:
        return autograd.LowRankUpdate.apply(weight, left, right, float(scale))
    updated = autograd.LowRankUpdate.apply(
        weight.unsqueeze(0), left.unsqueeze(0), right.unsqueeze(0), float(scale)
    )
    return updated.squeeze(0)


def apply_low_rank_(weight: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Add a low-rank update to a weight in place: `W += scale · left @ right`.

    Products are accumulated in fp32 (fp64 for an fp64 weight) and rounded once into the weight's type; the
    product `left @ right` never lies in memory. Not recorded by autograd, like an optimiser's step: for
    gradients, `low_rank_update`.

    Args:
        weight: W, [out, in] or [B, out, in], fp32, bf16, fp16 or fp64; may be strided, such as `weight.T`.
        left: [out, n] or [B, out, n], any floating type.
        right: [n, in] or [B, n, in], any floating type.
        scale: the factor of the product.

    Returns:
        The weight.

    Raises:
        ValueError: wrong shape, device or scale, a factor that is NaN or infinite, a weight whose elements
            overlap, or a factor that is a view of the weight; the weight is unchanged.
        TypeError: wrong dtype.

    Example:
        >>> ek.apply_low_rank_(layer.weight, left, right)
    """
    check.floating("weight", weight)
    check.floating("left", left)
    check.floating("right", right)
    check.expect(weight.dim() in (2, 3), "weight", "shape [out, in] or [B, out, in]", list(weight.shape))
    for name, factor in (("left", left), ("right", right)):
        check.expect(
            factor.dim() == weight.dim(), name, f"{weight.dim()} dimensions, as weight", factor.dim()
        )
    dtype = compute_dtype(weight)
    _check_scale(scale, dtype)
    matrix, left, right = weight.detach(), left.detach().to(dtype), right.detach().to(dtype)
    if weight.dim() == 2:
        matrix, left, right = matrix.unsqueeze(0), left.unsqueeze(0), right.unsqueeze(0)
    if matrix.stride(-1) != 1 and matrix.stride(-2) == 1:
        # A transposed view (GPT-2's Conv1D) has contiguous columns the other way round: Wᵀ += Rᵀ Lᵀ.
        matrix, left, right = matrix.mT, right.mT, left.mT
    ops.apply_low_rank_(matrix, left, right, float(scale))
    return weight


def _check_scale(scale: float, dtype: torch.dtype) -> None:
    check.number("scale", scale)
    largest = torch.finfo(dtype).max
    check.expect(-largest <= scale <= largest, "scale", f"at most {largest:.1e} in size", scale)


def _check_write(weight, keys, values, covariance, mode: str, ridge: float) -> bool:
    """Check the arguments of a write; return whether they are batched over matrices."""
    for name, tensor in (("weight", weight), ("keys", keys), ("values", values)):
        check.floating(name, tensor)
    check.expect(mode in MODES, "mode", f"one of {', '.join(MODES)}", repr(mode))
    check.number("ridge", ridge, at_least=0)
    check.expect(mode == "joint" or ridge == 0, "ridge", f"0 in mode {mode!r}", ridge)
    check.expect(weight.dim() in (2, 3), "weight", "shape [out, in] or [B, out, in]", list(weight.shape))
    batched = weight.dim() == 3
    leading, (rows, columns) = weight.shape[:-2], weight.shape[-2:]
    prefix = "B, " if batched else ""
    check.expect(keys.dim() == weight.dim(), "keys", f"shape [{prefix}n, in], as weight", list(keys.shape))
    check.shape("keys", keys, (*leading, keys.shape[-2], columns), f"[{prefix}n, in]")
    check.shape("values", values, (*leading, keys.shape[-2], rows), f"[{prefix}n, out]")
    check.same_device("keys", keys, weight.device)
    check.same_device("values", values, weight.device)
    matrix = covariance.inverse() if isinstance(covariance, Covariance) else covariance
    check.expect(
        isinstance(matrix, Tensor),
        "covariance",
        "a Covariance or an inverse",
        type(covariance).__name__,
        TypeError,
    )
    check.floating("covariance", matrix)
    check.expect(matrix.dim() in (2, 3), "covariance", "shape [in, in] or [B, in, in]", list(matrix.shape))
    own = matrix.dim() == 3
    check.expect(
        batched or not own, "covariance", "shape [in, in], as weight has no batch", list(matrix.shape)
    )
    meaning = "[B, in, in]" if own else "[in, in]"
    check.shape("covariance", matrix, (*(leading if own else ()), columns, columns), meaning)
    check.same_device("covariance", matrix, weight.device)
    return batched


# Columns of an inverse that are widened to fp64 at a time.
_PANEL = 1024


def _precondition(keys: Tensor, covariance: Covariance | Tensor) -> Tensor:
    """Return `P = K C⁻¹` in fp64, [B, n, in]."""
    inverse = covariance.inverse() if isinstance(covariance, Covariance) else covariance
    keys = keys.double()
    if inverse.dtype == torch.float64:
        return keys @ inverse
    # Products of an fp32 inverse cancel: in fp64 they keep the digits that it has, without a copy of in × in.
    return torch.cat([keys @ panel.double() for panel in inverse.split(_PANEL, dim=-1)], dim=-1)
