"""Matrices and memory layouts that the tests of several operator families draw on."""

import numpy as np
import torch

LAYOUTS = {
    "contiguous": lambda w: w,
    "rows strided": lambda w: torch.cat([w, w], -1)[..., : w.shape[-1]],
    "misaligned": lambda w: torch.cat([w.flatten()[:1], w.flatten()])[1:].view(w.shape),
    "transposed": lambda w: w.mT.contiguous().mT,
    "no unit stride": lambda w: torch.stack([w, w], -1)[..., 0],
}


def covariance_of(width: int, condition: float) -> torch.Tensor:
    """A random covariance with eigenvalues spread evenly in logarithm from 1 down to 1 / condition."""
    basis, _ = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))
    return (basis * torch.logspace(0, -np.log10(condition), width, dtype=torch.float64)) @ basis.T
