"""How near a result is to fp64, and how near it has to be.

The rule of every comparison: an error of at most twice that of the eager formula in the same type, both
against fp64. No tolerance is tuned.
"""

import numpy as np
import torch

from engram_kernels._ops import compute_dtype
from engram_kernels.backends import forced


def wide(tensor) -> np.ndarray:
    """A tensor as an extended-precision array: the truth must have more digits than fp64 results."""
    return np.asarray(
        torch.as_tensor(tensor).double().cpu() if torch.is_tensor(tensor) else tensor, np.longdouble
    )


def error(got, truth) -> float:
    """‖got − truth‖ / ‖truth‖."""
    got, truth = wide(got.detach()), wide(truth)
    assert got.shape == truth.shape and np.isfinite(got).all()
    scale = np.sqrt((truth**2).sum())
    return float(np.sqrt(((got - truth) ** 2).sum()) / (scale if scale > 0 else 1))


def rounding(dtype: torch.dtype, terms: int) -> float:
    """What two libraries' orders of summing so many terms may differ by: a random walk of their roundings."""
    return torch.finfo(dtype).eps * max(1, terms) ** 0.5


def within(got, truth, eager):
    """The rule, in the largest entry."""
    assert got.dtype == eager.dtype and got.shape == truth.shape
    if truth.size:
        mine, theirs = (np.abs(wide(x.detach()) - truth).max() for x in (got, eager))
        # One rounding to the type is allowed whatever the eager formula's luck, and two units in the
        # exponential: no more does CUDA promise of it.
        unit = torch.finfo(got.dtype).eps + 2 * torch.finfo(compute_dtype(got)).eps
        unit *= np.abs(truth).max()
        assert mine <= max(2 * theirs, unit), (float(mine), float(theirs), float(unit))


def truncates(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether stores are truncated instead of rounded: Triton's interpreter does so for bf16."""
    return forced() == "triton" and device.type == "cpu" and dtype == torch.bfloat16
