"""The associative write: its factors, and the low-rank update."""

import torch
from torch import Tensor

from .. import _checks as check
from .._linalg import compute_dtype
from ..covariance import Covariance
from .batching import folded
from .define import apply, backward, define
from .low_rank_solve import (
    Precondition,
    ResidualGram,
    ResidualRidge,
    SmallSolve,
    check_pairs,
    check_weight,
    names_of,
)

__all__ = ["apply_low_rank_", "low_rank_factors", "low_rank_update"]

MODES = ("joint", "sequential", "independent")

_LARGEST = torch.finfo(torch.float32).max


def low_rank_factors(
    weight: Tensor,
    keys: Tensor,
    values: Tensor | None = None,
    covariance: Covariance | None = None,
    mode: str = "joint",
    ridge: float = 0.0,
    *,
    residual: Tensor | None = None,
    inverse_covariance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the factors of the associative write that makes a weight answer keys with values.

    With `E = V − K Wᵀ`, `P = K C⁻¹`, `G = P Kᵀ` the update is `ΔW = Eᵀ S P`, as two factors:

    - "joint": `S = (λI + G)⁻¹`. λ = 0 meets every constraint exactly (EMMET); λ > 0 is MEMIT with
      `mom2_update_weight = λ`, since `K (λC + KᵀK)⁻¹ = (λI + G)⁻¹ P`.
    - "sequential": n rank-one writes, one after the other in the order of the rows (ROME n times), as one
      unit-triangular solve: `u_j = P_j / G_jj`, `R = (I + stril(K Uᵀ))⁻¹ E`, `ΔW = Rᵀ U`.
    - "independent": each row's own rank-one write into the weight as it is, `S = diag(1/G_jj)`: for one key a
      matrix, batched over matrices (ROME).

    The factors of the joint mode are `Eᵀ S` and `P` while keys are few. With a ridge they are `Eᵀ` and `S P`
    from n = in/2 on: in fp32 the others would cancel too much. From n = in on the latter comes as
    `S P = K (λC + KᵀK)⁻¹`, from a Cholesky factorisation of in × in instead of n × n.

    Differentiable in weight, keys, and values or residual.

    Args:
        weight: W, [out, in] or [B, out, in], fp32, bf16, fp16 or fp64.
        keys: K, [n, in] or [B, n, in], a key a row, any of these types.
        values: V, [n, out] or [B, n, out], the output wanted for each key, any of these types. Or else:
        residual: E, of the same shape, by how much each output shall change. Then no entry of the weight is
            read; nor is E looked at: `apply_low_rank_` looks at the factors.
        covariance: C. Or else:
        mode: "joint", "sequential" or "independent".
        ridge: λ of the joint mode, absolute; 0 for the others.
        inverse_covariance: C⁻¹, or what stands in its place, such as a projection: [in, in] or [B, in, in],
            symmetric and positive semidefinite, best in fp64.

    Returns:
        left [out, n] and right [n, in] (with B in front where the weight has it), so that the edited weight
        is `weight + left @ right`. fp64 for an fp64 weight, else fp32; the n × n algebra is fp64 always.

    Raises:
        ValueError: wrong shape, device, mode or ridge; a key or value that is NaN or infinite; a zero key;
            of covariance and inverse_covariance, or of values and residual, neither or both.
        TypeError: wrong dtype; a covariance that is a bare tensor.
        EngramError: dependent keys without a ridge, or an inverse_covariance that is not positive definite.

    Example:
        >>> left, right = ek.low_rank_factors(weight, keys, values, covariance)
        >>> ek.apply_low_rank_(weight, left, right)

    Source: Meng et al. 2022 (arXiv 2202.05262), eq. 2; Meng et al. 2023 (arXiv 2210.07229), eq. 14; Gupta et
        al. 2024 (arXiv 2403.14236), EMMET.
    """
    inverse = _inverse_of(covariance, inverse_covariance)
    given, name = (values, "values") if residual is None else (residual, "residual")
    both = f"{'neither' if given is None else 'both'}"
    check.expect((values is None) != (residual is None), "values", "either them or a residual", both)
    _check_write(weight, keys, given, inverse, mode, ridge, name)
    left, right = _factors(weight, keys, given, inverse, mode, ridge, ridge > 0, residual is not None)
    return (left, right) if weight.dim() == 3 else (left[0], right[0])


def _inverse_of(covariance: Covariance | None, inverse_covariance: Tensor | None) -> Tensor:
    given = f"{'neither' if covariance is None else 'both'}"
    one = (covariance is None) != (inverse_covariance is None)
    check.expect(one, "covariance", "either it or inverse_covariance", given)
    if covariance is None:
        return inverse_covariance
    expected = "a Covariance (a bare tensor C⁻¹ is given as inverse_covariance)"
    known = isinstance(covariance, Covariance)
    check.expect(known, "covariance", expected, type(covariance).__name__, TypeError)
    return covariance.inverse()


def _check_write(
    weight: Tensor,
    keys: Tensor,
    values: Tensor,
    inverse: Tensor,
    mode: str,
    ridge: float,
    name: str = "values",
) -> None:
    check_pairs(weight, keys, values, name)
    check.expect(mode in MODES, "mode", f"one of {', '.join(MODES)}", repr(mode))
    check.number("ridge", ridge, at_least=0)
    check.expect(mode == "joint" or ridge == 0, "ridge", f"0 in mode {mode!r}", ridge)
    name = "inverse_covariance"
    check.floating(name, inverse)
    batched = weight.dim() == 3
    known = inverse.dim() == 2 or (batched and inverse.dim() == 3)
    expected = f"shape [in, in]{' or [B, in, in]' if batched else ', as weight has no batch'}"
    check.expect(known, name, expected, list(inverse.shape))
    leading = weight.shape[: inverse.dim() - 2]
    meaning = names_of(inverse, "in, in")
    check.shape(name, inverse, (*leading, weight.shape[-1], weight.shape[-1]), meaning)
    check.same_device(name, inverse, weight.device)


def _factors(
    weight: Tensor,
    keys: Tensor,
    values: Tensor,
    inverse: Tensor,
    mode: str,
    ridge: float,
    direct: bool,
    given: bool = False,
) -> tuple[Tensor, Tensor]:
    """The factors [B, out, n] and [B, n, in] in the type that the weight is computed in.

    `direct`: of many keys in the joint mode they may be Eᵀ and S P, which are the more exact ones.
    `given`: the values are residuals; then the operators get no row of the weight.
    """
    if weight.dim() == 2:
        weight, keys, values = weight.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0)
    dtype = compute_dtype(weight)
    keys, values = keys.to(dtype), values.to(dtype)
    count, width = keys.shape[-2:]
    if given:
        read, wanted = weight[:, :0], values[..., :0]
    else:
        read, wanted = weight, values
    with torch.autocast(weight.device.type, enabled=False):
        if mode == "joint" and ridge > 0 and count >= width > 0:
            whole = inverse if inverse.dim() == 3 else inverse.unsqueeze(0)
            residual, right, _ = apply(ResidualRidge, read, keys, wanted, whole, float(ridge))
            return (values if given else residual).mT, right.to(dtype)
        preconditioned = precondition(keys, inverse)
        residual, gram = apply(ResidualGram, read, keys, wanted, preconditioned)
        residual = values if given else residual
        energy = gram.diagonal(dim1=-2, dim2=-1)
        if mode == "joint":
            identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
            system = (gram + gram.mT) / 2 + ridge * identity
            if direct and 2 * count >= width:
                return residual.mT, apply(SmallSolve, system, preconditioned, "cholesky").to(dtype)
            return apply(SmallSolve, system, residual, "cholesky").mT, preconditioned.to(dtype)
        right = preconditioned / energy.unsqueeze(-1)
        if mode == "sequential":
            residual = apply(SmallSolve, gram / energy.unsqueeze(-2), residual, "unit_lower")
        return residual.mT, right.to(dtype)


def precondition(keys: Tensor, inverse: Tensor) -> Tensor:
    """Return `P = K C⁻¹` in fp64, [B, n, in]."""
    if inverse.dtype == torch.float64:
        return keys.double() @ inverse
    # Products of an fp32 inverse cancel: in fp64 they keep the digits that it has, without a copy of in × in.
    if inverse.dim() == 3:
        return apply(Precondition, keys, inverse)
    return apply(Precondition, keys.reshape(1, -1, keys.shape[-1]), inverse.unsqueeze(0)).view(keys.shape)


# -- apply_low_rank_, low_rank_update ------------------------------------------------------------------------


def _check_factors(weight: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    # Where all is well this asks for little and makes no words: the call is as short as a kernel.
    for name, tensor in (("weight", weight), ("left", left), ("right", right)):
        check.floating(name, tensor)
    if weight.dim() not in (2, 3):
        check_weight(weight)
    *batch, rows, columns = weight.shape
    rank, device = left.shape[-1] if left.dim() else 0, weight.device
    if left.shape != (*batch, rows, rank) or right.shape != (*batch, rank, columns):
        check.dimensions("left", left, names_of(weight, "out, n"))
        check.shape("left", left, (*batch, rows, rank), names_of(weight, "out, n"))
        check.dimensions("right", right, names_of(weight, "n, in"))
        check.shape("right", right, (*batch, rank, columns), names_of(weight, "n, in"))
    if left.device != device or right.device != device:
        check.same_device("left", left, device)
        check.same_device("right", right, device)
    if type(alpha) is not float or not -_LARGEST <= alpha <= _LARGEST:
        _check_alpha(alpha, compute_dtype(weight))


def _check_alpha(alpha: float, dtype: torch.dtype) -> None:
    check.number("alpha", alpha)
    if dtype == torch.float32 and not -_LARGEST <= alpha <= _LARGEST:
        check.expect(False, "alpha", f"at most {_LARGEST:.1e} in size", alpha)


def _check_apply(weight: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    _check_factors(weight, left, right, alpha)
    if not weight.is_contiguous():
        check.no_overlap("weight", weight)


def _canonical_factors(weight: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    check.floating("left", left, (compute_dtype(weight),))
    check.floating("right", right, (compute_dtype(weight),))


def _canonical_update(weight: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    check.dimensions("weight", weight, "[B, out, in]")
    _canonical_factors(weight, left, right, alpha)


def _update_values(weight: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    check.finite("left", left)
    check.finite("right", right)


def _apply_apart(weight: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    check.own_memory(weight, left=left, right=right)


def _apply_guard(weight: Tensor, left: Tensor, right: Tensor, alpha: float) -> tuple[Tensor, tuple]:
    bad = check.not_finite(left, right)
    return bad, (weight, left.masked_fill(bad, 0), right.masked_fill(bad, 0), alpha)


_apply_low_rank_ = define(
    "apply_low_rank_(Tensor(a!) weight, Tensor left, Tensor right, float alpha) -> ()",
    _check_apply,
    _canonical_factors,
    fake=lambda weight, left, right, alpha: None,
    apart=_apply_apart,
    values=_update_values,
    guard=_apply_guard,
    complaint="apply_low_rank_: expected finite factors, got NaN or infinite; the weight is unchanged",
)

_low_rank_update = define(
    "low_rank_update(Tensor weight, Tensor left, Tensor right, float alpha) -> Tensor",
    _check_factors,
    _canonical_update,
    values=_update_values,
    guard=lambda weight, left, right, alpha: (check.not_finite(left, right), (weight, left, right, alpha)),
    complaint="low_rank_update: expected finite factors, got NaN or infinite",
    fake=lambda weight, left, right, alpha: torch.empty_like(weight, memory_format=torch.contiguous_format),
    batched=folded,
)


class LowRankUpdate(torch.autograd.Function):
    """W + α L R [B, out, in]; dW = g, dL = α g Rᵀ, dR = α Lᵀ g."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
        return _low_rank_update(weight, left, right, alpha)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, left, right, ctx.alpha = inputs
        ctx.save_for_backward(left, right)

    @backward
    def backward(ctx, gradient: Tensor):
        left, right = ctx.saved_tensors
        wide = gradient.to(left.dtype)
        d_left = ctx.alpha * (wide @ right.mT) if ctx.needs_input_grad[1] else None
        d_right = ctx.alpha * (left.mT @ wide) if ctx.needs_input_grad[2] else None
        return gradient if ctx.needs_input_grad[0] else None, d_left, d_right, None


def low_rank_update(
    weight: Tensor,
    keys: Tensor,
    values: Tensor,
    covariance: Covariance | None = None,
    mode: str = "joint",
    ridge: float = 0.0,
    alpha: float = 1.0,
    *,
    inverse_covariance: Tensor | None = None,
) -> Tensor:
    """Return the weight with keys and values written into it: `W + α · ΔW`, ΔW of `low_rank_factors`.

    Differentiable in weight, keys and values.

    Args:
        weight, keys, values, covariance, mode, ridge, inverse_covariance: as for `low_rank_factors`.
        alpha: α, the strength of the write. 1 is exact; 0 leaves the weight; −1 after a write takes it back,
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
    inverse = _inverse_of(covariance, inverse_covariance)
    _check_write(weight, keys, values, inverse, mode, ridge)
    _check_alpha(alpha, compute_dtype(weight))
    left, right = _factors(weight, keys, values, inverse, mode, ridge, direct=True)
    matrix = weight if weight.dim() == 3 else weight.unsqueeze(0)
    return apply(LowRankUpdate, matrix, left, right, float(alpha)).view(weight.shape)


def apply_low_rank_(weight: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """Add a low-rank update to a weight in place: `W += α · left @ right`.

    Products are accumulated in fp32 (fp64 for an fp64 weight) and rounded once into the weight's type; the
    product `left @ right` never lies in memory. Not recorded by autograd, like an optimiser's step: for
    gradients, `low_rank_update`.

    Args:
        weight: W, [out, in] or [B, out, in], fp32, bf16, fp16 or fp64; may be strided, such as `weight.T`.
        left: [out, n] or [B, out, n], any floating type.
        right: [n, in] or [B, n, in], any floating type.
        alpha: α, the factor of the product.

    Returns:
        The weight.

    Raises:
        ValueError: wrong shape, device or alpha, a factor that is NaN or infinite, a weight whose elements
            overlap, or a factor that is a view of the weight; the weight is unchanged.
        TypeError: wrong dtype.

    Example:
        >>> ek.apply_low_rank_(layer.weight, left, right)
    """
    _check_apply(weight, left, right, alpha)
    dtype = compute_dtype(weight)
    matrix = weight.detach() if weight.requires_grad else weight
    if left.requires_grad or left.dtype != dtype:
        left = left.detach().to(dtype)
    if right.requires_grad or right.dtype != dtype:
        right = right.detach().to(dtype)
    if matrix.stride(-1) != 1 and matrix.stride(-2) == 1:
        # A transposed view (GPT-2's Conv1D) has contiguous columns the other way round: Wᵀ += Rᵀ Lᵀ.
        matrix, left, right = matrix.mT, right.mT, left.mT
    _apply_low_rank_(matrix, left, right, float(alpha))
    return weight
