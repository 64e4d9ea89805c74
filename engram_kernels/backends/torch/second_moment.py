"""Reference of `second_moment_`: a GEMM, so it is the library's."""

import torch
from torch import Tensor

from .. import implements

# Rows converted to the accumulator's type at a time: enough for the GEMM to run at full speed.
_ROWS = 8192


@implements("second_moment_", "torch")
def second_moment_(accumulator: Tensor, inputs: Tensor, mask: Tensor | None) -> None:
    if mask is not None:
        # How many there are is not known on a GPU without a wait.
        inputs = inputs[mask] if mask.is_cpu else torch.where(mask.unsqueeze(-1), inputs, 0)
    with torch.no_grad():
        for rows in inputs.split(_ROWS):
            rows = rows.to(accumulator.dtype)
            accumulator.addmm_(rows.mT, rows)
