"""What the associative write solves: residual and Gram matrix, residual and ridge system, small systems."""

import torch
from torch import Tensor

from .. import _checks as check
from .._linalg import compute_dtype
from ..errors import EngramError
from .batching import folded
from .define import backward, define

SYSTEM_KINDS = ("cholesky", "unit_lower", "unit_upper")


def names_of(weight: Tensor, names: str) -> str:
    """Names of dimensions, with B in front where the weight is batched."""
    return f"[B, {names}]" if weight.dim() == 3 else f"[{names}]"


def check_weight(weight: Tensor) -> None:
    check.floating("weight", weight)
    if weight.dim() not in (2, 3):
        check.expect(False, "weight", "shape [out, in] or [B, out, in]", list(weight.shape))


def check_pairs(weight: Tensor, keys: Tensor, values: Tensor, name: str = "values") -> None:
    """Check a weight and what it shall answer to which keys; `name` is what the values are called."""
    check_weight(weight)
    *batch, rows, columns = weight.shape
    for argument, tensor, width, meaning in (
        ("keys", keys, columns, "n, in"),
        (name, values, rows, "n, out"),
    ):
        check.floating(argument, tensor)
        check.dimensions(argument, tensor, names_of(weight, meaning))
        check.shape(argument, tensor, (*batch, keys.shape[-2], width), names_of(weight, meaning))
        check.same_device(argument, tensor, weight.device)


# -- precondition --------------------------------------------------------------------------------------------


def _check_precondition(keys: Tensor, inverse: Tensor) -> None:
    check.floating("keys", keys)
    check.floating("inverse", inverse)
    check.dimensions("keys", keys, "[B, n, in]")
    batch, _, width = keys.shape
    check.shape("inverse", inverse, (batch, width, width), "[B, in, in]")
    check.same_device("inverse", inverse, keys.device)


_precondition = define(
    "precondition(Tensor keys, Tensor inverse) -> Tensor",
    _check_precondition,
    canonical=lambda keys, inverse: None,
    fake=lambda keys, inverse: keys.new_empty(keys.shape, dtype=torch.float64),
    batched=folded,
)


class Precondition(torch.autograd.Function):
    """P = K Q [B, n, in] in fp64, Q [B, in, in] in another type; dK = dP Qᵀ, dQ = Kᵀ dP."""

    generate_vmap_rule = True

    @staticmethod
    def forward(keys: Tensor, inverse: Tensor) -> Tensor:
        return _precondition(keys, inverse)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @backward
    def backward(ctx, gradient: Tensor):
        keys, inverse = ctx.saved_tensors
        d_keys = d_inverse = None
        if ctx.needs_input_grad[0]:
            d_keys = _precondition(gradient, inverse.mT).to(keys.dtype)
        if ctx.needs_input_grad[1]:
            d_inverse = (keys.double().mT @ gradient).to(inverse.dtype)
        return d_keys, d_inverse


# -- residual_gram -------------------------------------------------------------------------------------------


def _check_residual(weight: Tensor, keys: Tensor, values: Tensor, preconditioned: Tensor) -> None:
    check_pairs(weight, keys, values)
    check.shape("preconditioned", preconditioned, keys.shape, "as keys")
    check.same_device("preconditioned", preconditioned, weight.device)


def _canonical_pairs(weight: Tensor, keys: Tensor, values: Tensor) -> None:
    check.dimensions("weight", weight, "[B, out, in]")
    check.floating("keys", keys, (compute_dtype(weight),))
    check.floating("values", values, (compute_dtype(weight),))


def _canonical_residual(weight: Tensor, keys: Tensor, values: Tensor, preconditioned: Tensor) -> None:
    _canonical_pairs(weight, keys, values)
    check.floating("preconditioned", preconditioned, (torch.float64,))


def _blame(keys: Tensor, values: Tensor, inverse: Tensor, residual: Tensor) -> None:
    """Raise for what is wrong with the arguments of a write whose results are not sound, if it is that."""
    check.finite("keys", keys)
    check.finite("values", values)
    check.finite("inverse_covariance", inverse)
    check.finite("weight", residual)
    zero = (keys == 0).all(-1).nonzero().tolist()
    if zero:
        raise ValueError(f"keys: expected no zero key, got zeros in row {zero[0][1]} of matrix {zero[0][0]}")


def _check_symmetric(products: Tensor, scale: Tensor, what: str) -> None:
    # Rounding makes an inverse asymmetric by far less; a Cholesky factor given as one, by far more.
    apart = float(_asymmetry(products, scale))
    if apart > 1e-2:
        raise ValueError(
            f"inverse_covariance: expected a symmetric matrix, got one for which {what} differ by "
            f"{apart:.1g} of their scale"
        )


def _residual_gram_results(
    result: tuple[Tensor, Tensor], weight: Tensor, keys: Tensor, values: Tensor, preconditioned: Tensor
) -> None:
    # Whatever is wrong with an argument shows in E or on the diagonal of G, which are small: look there, and
    # at the arguments only to name the culprit.
    residual, gram = result
    energy = gram.diagonal(dim1=-2, dim2=-1)  # k C⁻¹ kᵀ of every key
    if not (check.is_finite(residual) and check.is_finite(energy) and bool((energy > 0).all())):
        _blame(keys, values, preconditioned, residual)
        raise EngramError(
            "inverse_covariance: expected a positive definite matrix, got one for which k C⁻¹ kᵀ = "
            f"{energy.min().item():.3g} for a key"
        )
    _check_symmetric(gram, energy.sqrt(), "kᵢ C⁻¹ kⱼ and kⱼ C⁻¹ kᵢ")


def _asymmetry(products: Tensor, scale: Tensor) -> Tensor:
    """The largest difference of a matrix's halves beside their scale, on the device."""
    apart = (products - products.mT).abs_().div_(scale.unsqueeze(-1)).div_(scale.unsqueeze(-2))
    return apart.amax() if apart.numel() else apart.new_zeros(())


def _residual_gram_suspect(result: tuple[Tensor, Tensor], *args: Tensor) -> Tensor:
    residual, gram = result
    energy = gram.diagonal(dim1=-2, dim2=-1)
    sound = (energy > 0).all() & (_asymmetry(gram, energy.sqrt()) <= 1e-2)
    return check.not_finite(residual, energy).logical_or_(sound.logical_not_())


_residual_gram = define(
    "residual_gram(Tensor weight, Tensor keys, Tensor values, Tensor preconditioned) -> (Tensor, Tensor)",
    _check_residual,
    _canonical_residual,
    fake=lambda weight, keys, values, preconditioned: (
        torch.empty_like(values, memory_format=torch.contiguous_format),
        preconditioned.new_empty(keys.shape[0], keys.shape[1], keys.shape[1]),
    ),
    batched=folded,
    results=_residual_gram_results,
    suspect=_residual_gram_suspect,
    complaint="residual_gram: expected finite keys, values and weights, and a symmetric positive definite "
    "inverse_covariance, got others",
)


class ResidualGram(torch.autograd.Function):
    """E = V − K Wᵀ and G = K Pᵀ; dW = −dEᵀ K, dK = −dE W + dG P, dV = dE, dP = dGᵀ K."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor, keys: Tensor, values: Tensor, preconditioned: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _residual_gram(weight, keys, values, preconditioned)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        weight, keys, _, preconditioned = inputs
        ctx.save_for_backward(weight, keys, preconditioned)

    @backward
    def backward(ctx, d_residual: Tensor, d_gram: Tensor):
        weight, keys, preconditioned = ctx.saved_tensors
        d_weight = d_keys = d_values = d_preconditioned = None
        if ctx.needs_input_grad[0]:
            d_weight = (-d_residual.mT @ keys).to(weight.dtype)
        if ctx.needs_input_grad[1]:
            d_keys = (d_gram @ preconditioned).to(keys.dtype) - d_residual @ weight.to(keys.dtype)
        if ctx.needs_input_grad[2]:
            d_values = d_residual
        if ctx.needs_input_grad[3]:
            d_preconditioned = d_gram.mT @ keys.double()
        return d_weight, d_keys, d_values, d_preconditioned


# -- residual_ridge ------------------------------------------------------------------------------------------


def _check_ridge(weight: Tensor, keys: Tensor, values: Tensor, inverse: Tensor, ridge: float) -> None:
    check_pairs(weight, keys, values)
    check.number("ridge", ridge, above=0)
    check.floating("inverse", inverse)
    width = weight.shape[-1]
    check.expect(inverse.shape[0] in (1, weight.shape[0]), "inverse", "1 or B matrices", list(inverse.shape))
    check.shape("inverse", inverse, (inverse.shape[0], width, width), "[1, in, in] or [B, in, in]")
    check.same_device("inverse", inverse, weight.device)


def _canonical_ridge(weight: Tensor, keys: Tensor, values: Tensor, inverse: Tensor, ridge: float) -> None:
    _canonical_pairs(weight, keys, values)
    check.dimensions("inverse", inverse, "[B, in, in]")


def _residual_ridge_results(
    result: tuple[Tensor, Tensor, Tensor, Tensor],
    weight: Tensor,
    keys: Tensor,
    values: Tensor,
    inverse: Tensor,
    ridge: float,
) -> None:
    residual, right, _, info = result
    if not (check.is_finite(residual) and check.is_finite(right)) or bool((keys == 0).all(-1).any()):
        _blame(keys, values, inverse, residual)
    scale = inverse.diagonal(dim1=-2, dim2=-1).sqrt().clamp_min(torch.finfo(inverse.dtype).tiny)
    _check_symmetric(inverse, scale, "its halves")
    if bool((info < 0).any()):
        raise EngramError("inverse_covariance: expected a positive definite matrix, got one that is not")
    if bool(info.any()) or not check.is_finite(right):
        raise EngramError(
            f"ridge: expected one that rounding leaves of λC + KᵀK, got {ridge:g}; give a larger one"
        )


_residual_ridge = define(
    "residual_ridge(Tensor weight, Tensor keys, Tensor values, Tensor inverse, float ridge) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _check_ridge,
    _canonical_ridge,
    fake=lambda weight, keys, values, inverse, ridge: (
        torch.empty_like(values, memory_format=torch.contiguous_format),
        keys.new_empty(keys.shape, dtype=torch.float64),
        keys.new_empty(keys.shape[0], keys.shape[2], keys.shape[2], dtype=torch.float64),
        keys.new_empty(keys.shape[0], dtype=torch.int32),
    ),
    batched=folded,
    results=_residual_ridge_results,
    suspect=lambda result, *args: check.not_finite(*result[:2]).logical_or_((result[3] != 0).any()),
    complaint="residual_ridge: expected finite keys, values and weights, a positive semidefinite "
    "inverse_covariance and a ridge that rounding leaves, got others",
)


class ResidualRidge(torch.autograd.Function):
    """E = V − K Wᵀ and R = K N, N = (λC + KᵀK)⁻¹ = HᵀH; with them H, a constant.

    With T = dR N: dW = −dEᵀ K, dK = −dE W + T − K (RᵀT + TᵀR), dV = dE.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor, keys: Tensor, values: Tensor, inverse: Tensor, ridge: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _residual_ridge(weight, keys, values, inverse, ridge)[:3]

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, right, half = output
        ctx.mark_non_differentiable(half)
        ctx.set_materialize_grads(False)  # that of H would be as large as C
        ctx.save_for_backward(*inputs[:2], right, half)

    @backward
    def backward(ctx, d_residual: Tensor | None, d_right: Tensor | None, _d_half: None):
        weight, keys, right, half = ctx.saved_tensors
        if d_residual is None:
            d_residual = keys.new_zeros(*keys.shape[:-1], weight.shape[-2])
        if d_right is None:
            d_right = torch.zeros_like(right)
        d_weight = d_keys = None
        if ctx.needs_input_grad[0]:
            d_weight = (-d_residual.mT @ keys).to(weight.dtype)
        if ctx.needs_input_grad[1]:
            solved = (d_right @ half.mT) @ half
            mixed = right.mT @ solved
            d_keys = (solved - keys.double() @ (mixed + mixed.mT)).to(keys.dtype)
            d_keys -= d_residual @ weight.to(keys.dtype)
        return d_weight, d_keys, d_residual if ctx.needs_input_grad[2] else None, None, None


# -- small_solve ---------------------------------------------------------------------------------------------


def _check_solve(system: Tensor, right_hand_side: Tensor, kind: str) -> None:
    check.expect(kind in SYSTEM_KINDS, "kind", f"one of {', '.join(SYSTEM_KINDS)}", repr(kind))
    check.floating("system", system, (torch.float64,))
    check.floating("right_hand_side", right_hand_side, (torch.float32, torch.float64))
    batch, count = system.shape[0], system.shape[-1]
    check.shape("system", system, (batch, count, count), "[B, n, n]")
    check.shape("right_hand_side", right_hand_side, (batch, count, right_hand_side.shape[-1]), "[B, n, m]")
    check.same_device("right_hand_side", right_hand_side, system.device)


def _canonical_solve(system: Tensor, right_hand_side: Tensor, kind: str) -> None:
    check.dimensions("system", system, "[B, n, n]")
    check.dimensions("right_hand_side", right_hand_side, "[B, n, m]")


def _small_solve_results(
    result: tuple[Tensor, Tensor], system: Tensor, right_hand_side: Tensor, kind: str
) -> None:
    failed = result[1].nonzero().flatten().tolist()
    if failed:
        matrix, order = failed[0], int(result[1][failed[0]])
        raise EngramError(
            f"keys: expected linearly independent rows, got key {order - 1} dependent on those before it"
            f"{f' in matrix {matrix}' if system.shape[0] > 1 else ''}; drop it, or give a ridge above 0"
        )
    # What is not finite before, as a gradient may be, need not be finite after.
    if not check.is_finite(result[0]) and check.is_finite(right_hand_side):
        raise EngramError("keys: expected keys whose update fits the type, got coefficients that overflow it")


def _small_solve_suspect(
    result: tuple[Tensor, Tensor], system: Tensor, right_hand_side: Tensor, kind: str
) -> Tensor:
    solution, info = result
    return (check.not_finite(solution) > check.not_finite(right_hand_side)).logical_or_((info != 0).any())


_small_solve = define(
    "small_solve(Tensor system, Tensor right_hand_side, str kind) -> (Tensor, Tensor)",
    _check_solve,
    _canonical_solve,
    fake=lambda system, right_hand_side, kind: (
        torch.empty_like(right_hand_side, memory_format=torch.contiguous_format),
        system.new_empty(system.shape[0], dtype=torch.int32),
    ),
    batched=folded,
    results=_small_solve_results,
    suspect=_small_solve_suspect,
    complaint="small_solve: expected linearly independent keys whose update fits the type, got others",
)


class SmallSolve(torch.autograd.Function):
    """X = A⁻¹ Y [B, n, m]; dY = A⁻ᵀ dX, dA = −dY Xᵀ (on the stored triangle where A is unit triangular)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(system: Tensor, right_hand_side: Tensor, kind: str) -> Tensor:
        return _small_solve(system, right_hand_side, kind)[0]

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        system, _, ctx.kind = inputs
        ctx.save_for_backward(system, output)

    @backward
    def backward(ctx, d_solution: Tensor):
        system, solution = ctx.saved_tensors
        transposed = {"cholesky": "cholesky", "unit_lower": "unit_upper", "unit_upper": "unit_lower"}[
            ctx.kind
        ]
        d_right, _ = _small_solve(system.mT.contiguous(), d_solution.contiguous(), transposed)
        d_system = None
        if ctx.needs_input_grad[0]:
            d_system = -d_right.double() @ solution.double().mT
            if ctx.kind == "unit_lower":
                d_system = d_system.tril(-1)
            elif ctx.kind == "unit_upper":
                d_system = d_system.triu(1)
        return d_system, d_right, None
