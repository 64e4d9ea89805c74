"""Errors against the truth, which is fp64 or wider, and the rules that bound them."""

import numpy as np
import torch

from engram_kernels._linalg import compute_dtype


def wide(tensor) -> np.ndarray:
    """A tensor as an extended-precision array: the truth must have more digits than fp64 results."""
    return np.asarray(
        torch.as_tensor(tensor).detach().double().cpu() if torch.is_tensor(tensor) else tensor, np.longdouble
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


def misrounded(got, truth) -> float:
    """The share of entries that are not the value of their type that is nearest to the truth."""
    nearest = torch.from_numpy(np.asarray(truth, np.float64)).to(got.dtype)
    return float((got.detach().cpu() != nearest).double().mean())


def check_rounded_once(got, truth) -> None:
    """Hold a result of 16 bits to one rounding, to the nearest, of a value computed in fp32.

    Such a value misses the nearest only where fp32's error reaches over a midpoint: one entry in thousands, a
    few in a hundred where large terms cancel. What is cut off instead misses it in every second entry, and is
    still within any bound of one unit.
    """
    if got.dtype in (torch.bfloat16, torch.float16) and got.numel():
        share = misrounded(got, truth)
        assert share <= max(0.05, 1 / got.numel()), f"{share:.3f} of the entries are not the nearest value"


def within(got, truth, eager) -> None:
    """The rule of every comparison, in the largest entry, and one rounding to a 16-bit type."""
    assert got.dtype == eager.dtype and got.shape == truth.shape
    if truth.size:
        mine, theirs = (np.abs(wide(x.detach()) - truth).max() for x in (got, eager))
        # One rounding to the type is allowed whatever the eager formula's luck, and two units in the
        # exponential: no more does CUDA promise of it.
        unit = torch.finfo(got.dtype).eps + 2 * torch.finfo(compute_dtype(got)).eps
        unit *= np.abs(truth).max()
        assert mine <= max(2 * theirs, unit), (float(mine), float(theirs), float(unit))
        check_rounded_once(got, truth)
