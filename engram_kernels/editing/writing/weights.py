"""The matrix of a projection: written, checked, copied, put back."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks as check
from ..._hashing import tensor_checksum
from ...errors import EngramError
from ...hf.placement import is_sharded, keep_part_, local, whole
from ...hf.projection import Projection
from ...ops import apply_low_rank_
from ...ops.waiting import raises_at_once


class Snapshot:
    """A projection and its weight as it lies in memory now, to be put back."""

    def __init__(self, projection: Projection):
        self.projection = projection
        self._weight = local(projection.weight).clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weight back, bit for bit."""
        local(self.projection.weight).copy_(self._weight)
        torch.clear_autocast_cache()


@raises_at_once
def add_(projection: Projection, left: Tensor, right: Tensor) -> None:
    """`weight += left @ right`, in place."""
    matrix = projection.whole()
    apply_low_rank_(matrix, left.to(matrix.device), right.to(matrix.device))
    weight = projection.weight
    if is_sharded(weight):
        # Each rank does the whole write, so that all have the bits of one device, and keeps its part.
        keep_part_(weight, matrix.T if projection.transposed else matrix)
    # A caller's autocast keeps copies of the weights in its own dtype, and does not see this write.
    torch.clear_autocast_cache()


def add_in_range(projection: Projection, left: Tensor, right: Tensor) -> None:
    """`weight += left @ right`, in place, which its type can hold.

    Raises:
        EngramError: an entry became infinite or NaN; it is in the weight now.
    """
    add_(projection, left, right)
    if not check.is_finite(projection.whole()):
        raise EngramError(f"edits: expected weights in the range of {projection.matrix.dtype}, got infinity")


def matrix_checksum(projection: Projection) -> str:
    """A digest of the weight's dtype, shape and bits."""
    return tensor_checksum(whole(projection.weight))
