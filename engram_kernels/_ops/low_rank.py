"""The associative write: residual and Gram matrix, small systems, low-rank update."""

import torch
from torch import Tensor

from .. import _checks as check
from ..errors import EngramError
from .define import compute_dtype, define

# -- residual_gram -------------------------------------------------------------------------------------------


def _residual_gram_arguments(weight: Tensor, keys: Tensor, values: Tensor, preconditioned: Tensor) -> None:
    check.floating("weight", weight)
    check.expect(weight.dim() == 3, "weight", "three dimensions [B, out, in]", list(weight.shape))
    batch, rows, columns = weight.shape
    check.expect(keys.dim() == 3, "keys", "three dimensions [B, n, in]", list(keys.shape))
    count = keys.shape[1]
    for name, tensor, width, meaning in (
        ("keys", keys, columns, "[B, n, in]"),
        ("values", values, rows, "[B, n, out]"),
        ("preconditioned", preconditioned, columns, "[B, n, in]"),
    ):
        wanted = torch.float64 if name == "preconditioned" else compute_dtype(weight)
        check.floating(name, tensor, (wanted,))
        check.shape(name, tensor, (batch, count, width), meaning)
        check.same_device(name, tensor, weight.device)


def _residual_gram_results(
    result: tuple[Tensor, Tensor], weight: Tensor, keys: Tensor, values: Tensor, preconditioned: Tensor
) -> None:
    # Whatever is wrong with an argument shows in E or on the diagonal of G, which are small: look there, and
    # at the arguments only to name the culprit.
    residual, gram = result
    energy = gram.diagonal(dim1=-2, dim2=-1)  # k C⁻¹ kᵀ of every key
    if not (check.is_finite(residual) and check.is_finite(energy) and bool((energy > 0).all())):
        check.finite("keys", keys)
        check.finite("values", values)
        check.finite("covariance", preconditioned)
        check.finite("weight", residual)
        zero = (keys == 0).all(-1).nonzero().tolist()
        if zero:
            raise ValueError(
                f"keys: expected no zero key, got zeros in row {zero[0][1]} of matrix {zero[0][0]}"
            )
        raise EngramError(
            "covariance: expected a positive definite matrix, got one for which k C⁻¹ kᵀ = "
            f"{energy.min().item():.3g} for a key"
        )
    # Rounding makes an inverse asymmetric by far less; a Cholesky factor given as one, by far more.
    scale = energy.sqrt()
    apart = (gram - gram.mT).abs_().div_(scale.unsqueeze(-1)).div_(scale.unsqueeze(-2))
    if apart.numel() and float(apart.max()) > 1e-2:
        raise ValueError(
            "covariance: expected a symmetric inverse, got one for which kᵢ C⁻¹ kⱼ and kⱼ C⁻¹ kᵢ differ by "
            f"{float(apart.max()):.1g} of their scale"
        )


define(
    "residual_gram(Tensor weight, Tensor keys, Tensor values, Tensor preconditioned) -> (Tensor, Tensor)",
    _residual_gram_arguments,
    fake=lambda weight, keys, values, preconditioned: (
        torch.empty_like(values, memory_format=torch.contiguous_format),
        preconditioned.new_empty(keys.shape[0], keys.shape[1], keys.shape[1]),
    ),
    results=_residual_gram_results,
)


# -- small_solve ---------------------------------------------------------------------------------------------

SYSTEM_KINDS = ("cholesky", "unit_lower", "unit_upper")


def _small_solve_arguments(system: Tensor, right_hand_side: Tensor, kind: str) -> None:
    check.expect(kind in SYSTEM_KINDS, "kind", f"one of {', '.join(SYSTEM_KINDS)}", repr(kind))
    check.floating("system", system, (torch.float64,))
    check.floating("right_hand_side", right_hand_side, (torch.float32, torch.float64))
    check.expect(system.dim() == 3, "system", "three dimensions [B, n, n]", list(system.shape))
    batch, count, _ = system.shape
    check.shape("system", system, (batch, count, count), "[B, n, n]")
    check.expect(right_hand_side.dim() == 3, "right_hand_side", "[B, n, m]", list(right_hand_side.shape))
    check.shape("right_hand_side", right_hand_side, (batch, count, right_hand_side.shape[-1]), "[B, n, m]")
    check.same_device("right_hand_side", right_hand_side, system.device)


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


define(
    "small_solve(Tensor system, Tensor right_hand_side, str kind) -> (Tensor, Tensor)",
    _small_solve_arguments,
    fake=lambda system, right_hand_side, kind: (
        torch.empty_like(right_hand_side, memory_format=torch.contiguous_format),
        system.new_empty(system.shape[0], dtype=torch.int32),
    ),
    results=_small_solve_results,
)


# -- apply_low_rank_, low_rank_update ------------------------------------------------------------------------


def _low_rank_arguments(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    check.floating("weight", weight)
    check.expect(weight.dim() == 3, "weight", "three dimensions [B, out, in]", list(weight.shape))
    batch, rows, columns = weight.shape
    check.expect(left.dim() == 3, "left", "three dimensions [B, out, n]", list(left.shape))
    count = left.shape[-1]
    for name, tensor, expected, meaning in (
        ("left", left, (batch, rows, count), "[B, out, n]"),
        ("right", right, (batch, count, columns), "[B, n, in]"),
    ):
        check.floating(name, tensor, (compute_dtype(weight),))
        check.shape(name, tensor, expected, meaning)
        check.same_device(name, tensor, weight.device)


def _apply_low_rank_arguments(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    _low_rank_arguments(weight, left, right, scale)
    check.no_overlap("weight", weight)


def _low_rank_values(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    for name, factor in (("left", left), ("right", right)):
        check.own_memory(name, factor, weight)
        check.finite(name, factor)


define(
    "apply_low_rank_(Tensor(a!) weight, Tensor left, Tensor right, float scale) -> ()",
    _apply_low_rank_arguments,
    fake=lambda weight, left, right, scale: None,
    values=_low_rank_values,
)

define(
    "low_rank_update(Tensor weight, Tensor left, Tensor right, float scale) -> Tensor",
    _low_rank_arguments,
    fake=lambda weight, left, right, scale: torch.empty_like(weight, memory_format=torch.contiguous_format),
)
