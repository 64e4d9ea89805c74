"""The state and the rows of an episodic memory, and how errors speak of them.

Errors name the arguments as the formulas do: state A [..., K, K] and B [..., K, C], or P = A⁻¹ and M = A⁻¹B,
and rows w (addressing weights, [..., N, K]) and z (latents, [..., N, C]). Operators take one batch dimension.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from .. import _checks as check
from ..errors import EngramError

STATE_DTYPES = (torch.float64, torch.float32)


def check_state(first: str, square: Tensor, second: str = "", wide: Tensor | None = None) -> None:
    """Check A [..., K, K] and B [..., K, C], or P and M: one shape of batch, one dtype, one device."""
    check.floating(first, square, STATE_DTYPES)
    is_square = square.dim() >= 2 and square.shape[-1] == square.shape[-2]
    check.expect(is_square, first, "shape [..., K, K]", list(square.shape))
    if not second:
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


def check_boundary_values(cu_seqlens: Tensor | None, w: Tensor) -> None:
    """Check that boundaries begin with 0, end with the number of rows, and do not fall."""
    if cu_seqlens is None:
        return
    ends = cu_seqlens.tolist()
    ordered = all(start <= end for start, end in pairwise(ends))
    sound = ordered and ends[0] == 0 and ends[-1] == w.shape[0]
    check.expect(sound, "cu_seqlens", f"numbers that do not fall, from 0 to {w.shape[0]}", ends)


def wrong_boundaries(cu_seqlens: Tensor, rows: int) -> Tensor:
    """The same on the device, without a wait: whether they are none."""
    falls = (cu_seqlens.diff() < 0).any()
    return falls | (cu_seqlens[0] != 0) | (cu_seqlens[-1] != rows)


def singular(matrix: int, batch: int, ridge: float) -> EngramError:
    """The error of a state that cannot be factored."""
    where = f" in memory {matrix}" if batch > 1 else ""
    return EngramError(
        f"A: expected a positive definite matrix, got one{where} that with ridge {ridge:g} is singular "
        "as far as its type can tell; give a larger ridge: without one, as many writes as slots are needed"
    )


def flat(tensor: Tensor) -> Tensor:
    """One leading dimension in place of all, [B, rows, columns]."""
    if tensor.dim() == 2:
        return tensor.unsqueeze(0)
    return tensor.reshape(math.prod(tensor.shape[:-2]), *tensor.shape[-2:])


def flat_view(name: str, tensor: Tensor) -> Tensor:
    """The same without a copy, for a tensor that is written."""
    leading = tensor.shape[:-2]
    if len(leading) < 2:
        return flat(tensor.detach())
    merges = all(
        tensor.stride(i) == tensor.stride(i + 1) * tensor.shape[i + 1] for i in range(len(leading) - 1)
    )
    check.expect(merges, name, "leading dimensions that lie in one row", f"strides {tensor.stride()}")
    return tensor.detach().view(math.prod(leading), *tensor.shape[-2:])
