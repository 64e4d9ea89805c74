"""Episodic memory on CPUs, in C++."""

import torch
from torch import Tensor

from ... import _cpu
from .. import implements
from ..native import DTYPE_CODES

# The C++ kernel passes over the state once a row, the reference's GEMMs once a chunk of rows. The kernel wins
# at cache speed, up to this many bytes of state, and beyond for a few rows: measured on one thread.
_CACHED_STATE = 1 << 19
_FEW_ROWS = 4


def _declines_stream(
    precision_inverse: Tensor, memory: Tensor, weights: Tensor, latents: Tensor
) -> str | None:
    count, state = weights.shape[1], precision_inverse[:1].nbytes + memory[:1].nbytes
    if state > _CACHED_STATE and count > _FEW_ROWS:
        return f"leaves {count} > {_FEW_ROWS} rows for a state beyond {_CACHED_STATE >> 10} KiB to GEMMs"
    return None


@implements("memory_stream", "cpu", _declines_stream)
def memory_stream(
    precision_inverse: Tensor, memory: Tensor, weights: Tensor, latents: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = [tensor.contiguous() for tensor in (precision_inverse, memory, weights, latents)]
    outputs = [tensor.new_empty(tensor.shape) for tensor in (precision_inverse, memory, latents)]
    outputs.append(weights.new_empty(weights.shape[:-1]))
    for state in outputs[:2]:
        _cpu.advise_huge_pages(state.data_ptr(), state.nbytes)
    _cpu.memory_stream(
        *(tensor.data_ptr() for tensor in inputs),
        DTYPE_CODES[memory.dtype],
        *memory.shape,
        weights.shape[1],
        *(tensor.data_ptr() for tensor in outputs),
        torch.get_num_threads(),
    )
    return tuple(outputs)
