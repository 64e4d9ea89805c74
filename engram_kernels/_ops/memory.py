"""Episodic memory: accumulate, solve, leverages, the streaming write, the pseudo-inverse.

Errors name the arguments as the formulas do: state A [B, K, K] and B [B, K, C], or P = A⁻¹ and M = A⁻¹B, and
rows w (addressing weights, [B, N, K]) and z (latents, [B, N, C]).
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from .. import _checks as check
from ..errors import EngramError
from .define import define

STATE_DTYPES = (torch.float64, torch.float32)


def check_state(names: str, square: Tensor, wide: Tensor | None) -> None:
    """Check A [..., K, K] and B [..., K, C], or P and M: one shape of batch, one dtype, one device."""
    first, second = names
    check.floating(first, square, STATE_DTYPES)
    is_square = square.dim() >= 2 and square.shape[-1] == square.shape[-2]
    check.expect(is_square, first, "shape [..., K, K]", list(square.shape))
    if wide is None:
        return
    check.floating(second, wide, (square.dtype,))
    check.expect(wide.dim() >= 2, second, "shape [..., K, C]", list(wide.shape))
    check.shape(second, wide, (*square.shape[:-1], wide.shape[-1]), "[..., K, C]")
    check.same_device(second, wide, square.device)


def check_rows(square: Tensor, wide: Tensor | None, w: Tensor, z: Tensor | None, ragged: bool) -> None:
    """Check w [..., N, K] and z [..., N, C]; ragged: [T, K] and [T, C]."""
    leading, meaning = ((), "[T") if ragged else (square.shape[:-2], "[..., N")
    check.floating("w", w)
    check.expect(w.dim() == len(leading) + 2, "w", f"shape {meaning}, K]", list(w.shape))
    rows = (*leading, w.shape[-2])
    check.shape("w", w, (*rows, square.shape[-1]), f"{meaning}, K]")
    check.same_device("w", w, square.device)
    if z is not None:
        check.floating("z", z)
        check.shape("z", z, (*rows, wide.shape[-1]), f"{meaning}, C]")
        check.same_device("z", z, square.device)


def check_boundaries(batch: int, cu_seqlens: Tensor | None, device: torch.device) -> None:
    """Check the type and shape of the boundaries of ragged episodes."""
    if cu_seqlens is None:
        return
    integers = isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype in (torch.int64, torch.int32)
    got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
    check.expect(integers, "cu_seqlens", "a tensor of int64, int32", got, TypeError)
    check.shape("cu_seqlens", cu_seqlens, (batch + 1,), "the batch and one")
    check.same_device("cu_seqlens", cu_seqlens, device)


def _boundary_values(cu_seqlens: Tensor | None, w: Tensor) -> None:
    if cu_seqlens is None:
        return
    ends = cu_seqlens.tolist()
    ordered = all(start <= end for start, end in pairwise(ends))
    sound = ordered and ends[0] == 0 and ends[-1] == w.shape[0]
    check.expect(sound, "cu_seqlens", f"numbers that do not fall, from 0 to {w.shape[0]}", ends)


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


def _singular(matrix: int, batch: int, ridge: float) -> EngramError:
    where = f" in memory {matrix}" if batch > 1 else ""
    return EngramError(
        f"A: expected a positive definite matrix, got one{where} that with ridge {ridge:g} is singular "
        "as far as its type can tell; give a larger ridge: without one, as many writes as slots are needed"
    )


# -- memory_accumulate_ --------------------------------------------------------------------------------------


def _accumulate_arguments(
    gram: Tensor,
    cross: Tensor,
    weights: Tensor,
    latents: Tensor,
    alpha: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    check_state("AB", gram, cross)
    check.expect(gram.dim() == 3, "A", "three dimensions [B, K, K]", list(gram.shape))
    check_rows(gram, cross, weights, latents, ragged=cu_seqlens is not None)
    if alpha is not None:
        check.floating("alpha", alpha, (gram.dtype,))
        check.shape("alpha", alpha, weights.shape[:-1], "one entry a row of w")
        check.same_device("alpha", alpha, gram.device)
    check_boundaries(gram.shape[0], cu_seqlens, gram.device)
    check.no_overlap("A", gram)
    check.no_overlap("B", cross)


def _accumulate_values(
    gram: Tensor,
    cross: Tensor,
    weights: Tensor,
    latents: Tensor,
    alpha: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    apart = cross.numel() == 0 or cross.data_ptr() != gram.data_ptr()
    check.expect(apart, "B", "memory of its own", "the memory of A")
    for written in (gram, cross):
        check.own_memory("w", weights, written)
        check.own_memory("z", latents, written)
    _boundary_values(cu_seqlens, weights)
    _product_values(gram.dtype, alpha, w=weights, z=latents)


define(
    "memory_accumulate_(Tensor(a!) gram, Tensor(b!) cross, Tensor weights, Tensor latents, Tensor? alpha, "
    "Tensor? cu_seqlens) -> ()",
    _accumulate_arguments,
    fake=lambda gram, cross, weights, latents, alpha, cu_seqlens: None,
    values=_accumulate_values,
)


# -- memory_solve --------------------------------------------------------------------------------------------


def _solve_arguments(gram: Tensor, cross: Tensor, ridge: float, finite: bool) -> None:
    check_state("AB", gram, cross)
    check.expect(gram.dim() == 3, "A", "three dimensions [B, K, K]", list(gram.shape))


def _solve_results(
    result: tuple[Tensor, Tensor], gram: Tensor, cross: Tensor, ridge: float, finite: bool
) -> None:
    memory, info = result
    failed = info.nonzero().flatten().tolist()
    if failed or (finite and not check.is_finite(memory)):
        check.finite("A", gram)
        check.finite("B", cross)
    if failed:
        raise _singular(failed[0], gram.shape[0], ridge)


# `finite` says whether B must be; a gradient need not, and gives what it gives.
define(
    "memory_solve(Tensor gram, Tensor cross, float ridge, bool finite) -> (Tensor, Tensor)",
    _solve_arguments,
    fake=lambda gram, cross, ridge, finite: (
        torch.empty_like(cross, memory_format=torch.contiguous_format),
        gram.new_empty(gram.shape[0], dtype=torch.int32),
    ),
    results=_solve_results,
)


# -- memory_leverages ----------------------------------------------------------------------------------------


def _leverages_arguments(
    gram: Tensor, weights: Tensor, cu_seqlens: Tensor | None, ridge: float, limit: float
) -> None:
    check_state("AB", gram, None)
    check.expect(gram.dim() == 3, "A", "three dimensions [B, K, K]", list(gram.shape))
    check_rows(gram, None, weights, None, ragged=cu_seqlens is not None)
    check_boundaries(gram.shape[0], cu_seqlens, gram.device)


def _leverages_values(
    gram: Tensor, weights: Tensor, cu_seqlens: Tensor | None, ridge: float, limit: float
) -> None:
    _boundary_values(cu_seqlens, weights)
    check.finite("w", weights)


def _leverages_results(
    result: tuple[Tensor, Tensor, Tensor],
    gram: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    ridge: float,
    limit: float,
) -> None:
    _, largest, info = result
    failed = info.nonzero().flatten().tolist()
    if failed:
        check.finite("A", gram)
        raise _singular(failed[0], gram.shape[0], ridge)
    if largest.numel() == 0:
        return
    worst = int(largest.argmax())
    if not largest[worst].item() < limit:
        where = f" in memory {worst}" if gram.shape[0] > 1 else ""
        raise EngramError(
            f"w: expected rows that the memory holds, whose largest block leverage is below {limit:.9g}, got "
            f"{largest[worst].item():.9g}{where}; nothing was forgotten"
        )


define(
    "memory_leverages(Tensor gram, Tensor weights, Tensor? cu_seqlens, float ridge, float limit) "
    "-> (Tensor, Tensor, Tensor)",
    _leverages_arguments,
    fake=lambda gram, weights, cu_seqlens, ridge, limit: (
        weights.new_empty(weights.shape[:-1], dtype=gram.dtype),
        gram.new_empty(gram.shape[0], dtype=torch.float64),
        gram.new_empty(gram.shape[0], dtype=torch.int32),
    ),
    values=_leverages_values,
    results=_leverages_results,
)


# -- memory_stream -------------------------------------------------------------------------------------------


def _stream_arguments(precision_inverse: Tensor, memory: Tensor, weights: Tensor, latents: Tensor) -> None:
    check_state("PM", precision_inverse, memory)
    check.expect(
        precision_inverse.dim() == 3, "P", "three dimensions [B, K, K]", list(precision_inverse.shape)
    )
    check_rows(precision_inverse, memory, weights, latents, ragged=False)
    for name, tensor in (("w", weights), ("z", latents)):
        check.floating(name, tensor, (precision_inverse.dtype,))


def _stream_results(
    result: tuple[Tensor, Tensor, Tensor, Tensor],
    precision_inverse: Tensor,
    memory: Tensor,
    weights: Tensor,
    latents: Tensor,
) -> None:
    # A state that is not finite or not positive definite shows in the rows, which are small beside it.
    _, _, readouts, leverages = result
    if check.is_finite(readouts) and check.is_finite(leverages) and not bool((leverages > 1).any()):
        return
    for name, tensor in (("P", precision_inverse), ("M", memory), ("w", weights), ("z", latents)):
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


define(
    "memory_stream(Tensor precision_inverse, Tensor memory, Tensor weights, Tensor latents) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _stream_arguments,
    fake=_stream_fake,
    results=_stream_results,
)


def _stream_gradient_arguments(
    precision_inverse: Tensor,
    memory: Tensor,
    weights: Tensor,
    latents: Tensor,
    d_precision_inverse: Tensor,
    d_memory: Tensor,
    d_readouts: Tensor,
    d_leverages: Tensor,
) -> None:
    _stream_arguments(precision_inverse, memory, weights, latents)
    for name, gradient, of in (
        ("d_precision_inverse", d_precision_inverse, precision_inverse.shape),
        ("d_memory", d_memory, memory.shape),
        ("d_readouts", d_readouts, latents.shape),
        ("d_leverages", d_leverages, weights.shape[:-1]),
    ):
        check.floating(name, gradient, (precision_inverse.dtype,))
        check.shape(name, gradient, of, "as the output it belongs to")
        check.same_device(name, gradient, precision_inverse.device)


define(
    "memory_stream_gradient(Tensor precision_inverse, Tensor memory, Tensor weights, Tensor latents, "
    "Tensor d_precision_inverse, Tensor d_memory, Tensor d_readouts, Tensor d_leverages) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _stream_gradient_arguments,
    fake=lambda precision_inverse, memory, weights, latents, *gradients: tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (precision_inverse, memory, weights, latents)
    ),
)


# -- pseudo_inverse ------------------------------------------------------------------------------------------


def _pseudo_inverse_arguments(a: Tensor, ridge: float | None, relative: float) -> None:
    check.floating("a", a, (torch.float64,))
    check.expect(a.dim() == 3, "a", "three dimensions [B, m, n]", list(a.shape))
    check.expect(a.shape[-2] >= a.shape[-1], "a", "at least as many rows as columns", list(a.shape))


def _pseudo_inverse_results(
    result: tuple[Tensor, Tensor, Tensor], a: Tensor, ridge: float | None, relative: float
) -> None:
    inverse, _, info = result
    failed = info.nonzero().flatten().tolist()
    if not failed and check.is_finite(inverse):
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


define(
    "pseudo_inverse(Tensor a, float? ridge, float relative) -> (Tensor, Tensor, Tensor)",
    _pseudo_inverse_arguments,
    fake=lambda a, ridge, relative: (
        a.new_empty(a.shape[0], a.shape[2], a.shape[1]),
        a.new_empty(a.shape[0], a.shape[2], a.shape[2]),
        a.new_empty(a.shape[0], dtype=torch.int32),
    ),
    results=_pseudo_inverse_results,
)
