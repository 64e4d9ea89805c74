"""Reference of sparse differences: what changed between two models."""

import torch
from torch import Tensor

from ..._linalg import compute_dtype
from .. import implements

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def changed(old: Tensor, new: Tensor, threshold: float | None) -> Tensor:
    """Where the bits differ and, with a threshold, |new − old| in fp32 (fp64) is not at most that."""
    bits = BITS[old.element_size()]
    differs = old.view(bits) != new.view(bits)
    if threshold is None:
        return differs
    wide = compute_dtype(old)
    return differs & ~((new.to(wide) - old.to(wide)).abs() <= threshold)


@implements("sparse_diff", "torch")
def sparse_diff(
    old: list[Tensor], new: list[Tensor], threshold: float | None, wide: bool
) -> tuple[list[Tensor], list[Tensor]]:
    old, new = [before.view(-1) for before in old], [after.view(-1) for after in new]
    places = [
        changed(before, after, threshold).nonzero().flatten() for before, after in zip(old, new, strict=True)
    ]
    index = torch.int64 if wide else torch.int32
    return [at.to(index) for at in places], [after[at] for after, at in zip(new, places, strict=True)]
