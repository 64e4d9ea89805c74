"""Reference of `second_moment_`: a GEMM, so it is the library's."""

import torch
from torch import Tensor

from .. import implements

# Rows converted to the accumulator's type at a time: enough for the GEMM to run at full speed.
_ROWS = 8192


@implements("second_moment_", "torch")
def second_moment_(accumulator: Tensor, inputs: Tensor, mask: Tensor | None) -> None:
    if mask is not None:
        inputs = inputs[mask]
    with torch.no_grad():
        for rows in inputs.split(_ROWS):
            rows = rows.to(accumulator.dtype)
            accumulator.addmm_(rows.mT, rows)
