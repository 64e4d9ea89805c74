"""What a method makes of a layer's statistics, of earlier keys and of a batch: its operator."""

from __future__ import annotations

import math
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...covariance import Covariance
from ...errors import EngramError
from ...preconditioner import Preconditioner
from ..methods import Method

# By covariance and threshold: the eigenvectors of a wide layer take minutes.
_PRINCIPAL: WeakKeyDictionary[Covariance, dict[float, Tensor]] = WeakKeyDictionary()


class Solved(NamedTuple):
    """The factors of a write, and the residuals and the ridge that they solve for, if they do."""

    left: Tensor
    right: Tensor
    residuals: Tensor | None
    ridge: float | None


class LayerOperator:
    """The operator of one layer, which changes with every batch that is written.

    Args:
        method: its settings.
        covariance: `C [in, in]` of the layer's inputs.

    Raises:
        EngramError: the null space has no direction, or all.

    Example:
        >>> operator = LayerOperator(METHODS["encore"], covariance)
        >>> for keys, residuals in batches:
        ...     left, right, *_ = operator.factors(weight, keys, residuals)
        ...     ek.apply_low_rank_(weight, left, right)
        ...     operator.remember(keys)
    """

    def __init__(self, method: Method, covariance: Covariance):
        self.method = method
        self._covariance = covariance
        # What a renewal needs: all keys, and how many were there at the last one.
        self._keys: list[Tensor] = []
        self._renewed = 0
        #: before any batch, and for the next one, before its own keys have a say
        self.first = self.current = self._made(principal_directions(covariance, method.null_space))
        self._ideal = None
        if method.ideal is not None:
            self._ideal = Preconditioner.from_identity(
                covariance.dim, 1.0 / method.ideal, ridge=1.0, device=self.current.device
            )

    def factors(self, matrix: Tensor, keys: Tensor, residuals: Tensor) -> Solved:
        """The write of a batch.

        Args:
            matrix: `W [out, in]` as it is now; its entries are read where directions are suppressed alone.
            keys: `[n, in]`.
            residuals: `[n, out]`, by how much the answers shall change.

        Raises:
            EngramError: dependent keys without a ridge.
        """
        operator = self.current
        if self.method.neurons is not None:
            operator = operator.within(strongest_neurons(keys, self.method.neurons))
        if self.method.suppress is not None:
            energy, alpha = self.method.suppress
            operator = operator.suppress(row_directions(matrix, energy), alpha)
        left, right = operator.factors(matrix, keys, residual=residuals)
        if self._ideal is None:
            return Solved(left, right, residuals, self.method.ridge)
        # What the editor changes of the answers, which one write of all edits would have given.
        changed = ((keys.double() @ right.double().T) @ left.double().T).to(residuals.dtype)
        return Solved(*self._ideal.factors(matrix, keys, residual=changed), changed, 1.0)

    def remember(self, keys: Tensor) -> None:
        """Hold the answers to keys that were written, as far as the method does."""
        method, keys = self.method, keys.to(self.current.device)
        if method.renew is not None:
            self._keys.append(keys)
            written = sum(map(len, self._keys))
            if written - self._renewed >= method.renew:
                self._renewed = written
                self._renew(torch.cat(self._keys))
                keys = keys[:0]
        if method.held:
            self.current = self.current.preserve(keys, method.held)
        if self._ideal is not None:
            self._ideal = self._ideal.preserve(keys)

    def _made(self, principal: Tensor | None) -> Preconditioner:
        """The operator before any edit: writes stay beside the principal directions `[r, in]`."""
        method = self.method
        operator = Preconditioner.from_covariance(
            self._covariance, method.moment, method.identity, method.ridge
        )
        return operator if principal is None else operator.preserve(principal, math.inf)

    def _renew(self, keys: Tensor) -> None:
        """Seek the null space of what is to be preserved, statistics and keys, and begin anew in it."""
        method = self.method
        weight = method.moment / (method.moment + 1)
        protected = Preconditioner.from_covariance(self._covariance, weight)
        protected = protected.preserve(keys, 1.0 / (len(keys) * (method.moment + 1)))
        self.current = self._made(_principal(protected.matrix(), method.null_space))
        self.current = self.current.preserve(keys, method.held)


def principal_directions(covariance: Covariance, threshold: float | None) -> Tensor | None:
    """The directions that ordinary text uses, `[r, in]`: the complement of AlphaEdit's null space.

    Args:
        covariance: `C [in, in]`.
        threshold: eigenvalues of `C` above this share of their mean count; None: no null space is asked for.

    Returns:
        Orthonormal rows in fp64.

    Raises:
        EngramError: there are none, or nothing is left beside them.

    Source: Fang et al. 2024 (arXiv 2410.02355), AlphaEdit.
    """
    if threshold is None:
        return None
    known = _PRINCIPAL.setdefault(covariance, {})
    if threshold not in known:
        known[threshold] = _principal(covariance.inverse(), threshold)
    return known[threshold]


def _principal(inverse: Tensor, threshold: float) -> Tensor:
    values, vectors = torch.linalg.eigh(inverse)
    moments = values.reciprocal()
    used = moments > threshold * moments.mean()
    if used.all() or not used.any():
        raise EngramError(
            f"null_space: expected a threshold between {float(moments.min() / moments.mean()):.1e} and "
            f"{float(moments.max() / moments.mean()):.1e} of the mean eigenvalue, got {threshold:g}"
        )
    return vectors[:, used].T.contiguous()


def strongest_neurons(keys: Tensor, share: float) -> Tensor:
    """The strongest neurons, up to this share of the summed magnitude of keys `[n, in]`; at least one.

    Source: Jiang et al. 2024 (arXiv 2410.04045), NSE.
    """
    scores, order = keys.double().abs().sum(0).sort(descending=True)
    return order[: max(1, int((scores.cumsum(0) <= share * scores.sum()).sum()))]


def row_directions(matrix: Tensor, energy: float) -> Tensor:
    """The principal directions `[r, in]` of a weight's normalised rows that hold a share of their energy.

    Source: Liu et al. 2025 (arXiv 2510.01172), SPHERE.
    """
    rows = matrix.detach().double()
    rows = rows / (rows.norm(dim=1, keepdim=True) + 1e-8)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    shares = values.flip(0).cumsum(0) / values.sum()
    count = min(len(values), int((shares <= energy).sum()) + 1)
    return vectors[:, -count:].T.contiguous()
