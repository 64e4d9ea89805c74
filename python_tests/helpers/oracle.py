"""The associative write in fp64 NumPy, by other routes than the package's: dense solves, loops."""

import numpy as np


def joint(weight, keys, values, covariance, ridge: float):
    """MEMIT's normal equations for a ridge; without one, the least change that meets every constraint."""
    residual = (values - keys @ weight.T).T
    width, count = weight.shape[1], len(keys)
    if ridge > 0:
        return weight + np.linalg.solve(ridge * covariance + keys.T @ keys, keys.T @ residual.T).T
    # min tr(D C Dᵀ) subject to D kᵀ = e: the Karush-Kuhn-Tucker system.
    system = np.block([[covariance, keys.T], [keys, np.zeros((count, count))]])
    right = np.concatenate([np.zeros((width, weight.shape[0])), residual.T])
    return weight + np.linalg.solve(system, right)[:width].T


def _writes(weight, keys, values, covariance, base):
    """Meng et al. 2022, eq. 2, key by key; residuals against `base`, or against what is written if None."""
    directions = np.linalg.solve(covariance, keys.T).T
    for key, value, direction in zip(keys, values, directions, strict=True):
        current = weight if base is None else base
        weight = weight + np.outer(value - current @ key, direction) / (direction @ key)
    return weight


def write(mode: str, weight, keys, values, covariance, ridge: float = 0.0):
    """Return the edited weight; all arguments fp64 arrays, `covariance` itself and not its inverse."""
    if mode == "joint":
        return joint(weight, keys, values, covariance, ridge)
    return _writes(weight, keys, values, covariance, None if mode == "sequential" else weight)
