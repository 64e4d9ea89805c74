"""A symmetric, positive semidefinite matrix in fp64 as a base and rank-one terms beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import _checks as check
from ._linalg import cholesky, damped_root, square_root
from .errors import EngramError

_EPS = torch.finfo(torch.float64).eps

# A key is released where this share of its pivot is left: the error is eps over its square, so 1e-8.
_RELEASED = 1e-4


@dataclass(frozen=True)
class Semidefinite:
    """`Q = base + rowsᵀ diag(signs) rows`, never changed: each method returns another.

    Terms cost `n in²` for n keys, and leave the base, which may be shared, as it is. From in/2 of them on a
    product with them costs more than one with a matrix: then they are added into one.

    Attributes:
        base: `[in, in]`, or a number for `c I`.
        rows: `[m, in]`; its device is the matrix's.
        signs: `[m]`.
        scale: the largest diagonal entry that Q ever had: against it an eigenvalue is none.
        free: `[in]`, of the rows and columns that are not zero; None: all.
    """

    base: Tensor | float
    rows: Tensor = field(repr=False)
    signs: Tensor = field(repr=False)
    scale: float
    free: Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(cls, base: Tensor | float, dim: int, device: torch.device) -> Semidefinite:
        """A matrix, or a multiple of the identity, without terms."""
        scale = float(base.diagonal().max()) if isinstance(base, Tensor) else base
        rows = torch.empty(0, dim, dtype=torch.float64, device=device)
        return cls(base, rows, rows.new_empty(0), scale)

    @property
    def dim(self) -> int:
        """The number of rows and of columns."""
        return self.rows.shape[1]

    def product(self, keys: Tensor) -> Tensor:
        """`K Q [n, in]` in fp64."""
        wide = keys.double()
        product = wide @ self.base if isinstance(self.base, Tensor) else wide * self.base
        if len(self.rows):
            product = torch.addmm(product, wide @ self.rows.T * self.signs, self.rows)
        return product if self.free is None else product * self.free

    def matrix(self) -> Tensor:
        """`Q [in, in]`; the base itself where there is nothing beside it."""
        if isinstance(self.base, Tensor):
            whole = self.base
        else:
            whole = self.base * torch.eye(self.dim, dtype=torch.float64, device=self.rows.device)
        if len(self.rows):
            whole = torch.addmm(whole, self.rows.T * self.signs, self.rows)
        if self.free is not None:
            whole = whole * (self.free & self.free.unsqueeze(1))
        return whole

    def preserve(self, keys: Tensor, weight: float) -> Semidefinite:
        """`(Q⁻¹ + w KᵀK)⁻¹`, w up to infinity.

        Raises:
            ValueError: keys that are not finite.
            EngramError: rounding leaves nothing of the keys.
        """
        if math.isinf(weight):
            return self.beside(self.held(keys), -1.0)
        if len(keys) < self.dim:
            product, system = self._system(keys)
            system.diagonal().add_(1.0 / weight)
            factor, lost = cholesky(system)
            if not bool(lost):
                return self.beside(torch.linalg.solve_triangular(factor, product, upper=False), -1.0)
        half = self.damped(keys, 1.0 / weight, "weight")
        return self.dense(half.T @ half / weight)

    def release(self, keys: Tensor, weight: float) -> Semidefinite | None:
        """`(Q⁻¹ − w KᵀK)⁻¹`; None where less than eight digits of it would be left."""
        product, system = self._system(keys)
        system = -system
        system.diagonal().add_(1.0 / weight)
        factor, failed = torch.linalg.cholesky_ex(system)
        left = factor.diagonal().square() * weight
        if bool(failed) or not bool((left > _RELEASED).all()):
            return None
        return self.beside(torch.linalg.solve_triangular(factor, product, upper=False), 1.0)

    def _system(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """`K Q` and `K Q Kᵀ`."""
        product = self.product(keys)
        system = product @ keys.double().T
        return product, (system + system.T) / 2

    def beside(self, rows: Tensor, sign: float) -> Semidefinite:
        """`Q ± rowsᵀ rows`."""
        joined = torch.cat([self.rows, rows])
        found = replace(self, rows=joined, signs=torch.cat([self.signs, rows.new_full((len(rows),), sign)]))
        return found.dense(found.matrix()) if 2 * len(joined) >= self.dim else found

    def dense(self, matrix: Tensor) -> Semidefinite:
        """Another matrix in the place of this one, without terms."""
        return replace(self, base=(matrix + matrix.T) / 2, rows=self.rows[:0], signs=self.signs[:0])

    def damped(self, keys: Tensor, ridge: float, name: str) -> Tensor:
        """H with `HᵀH = (ridge Q⁻¹ + KᵀK)⁻¹`.

        Raises:
            ValueError: keys that are not finite.
            EngramError: rounding leaves nothing of the keys or of the argument `name`, which is the ridge; or
                Q is not positive semidefinite.
        """
        half, lost = damped_root(keys, self._root(), ridge)
        if bool(lost) or not check.is_finite(half):
            check.finite("keys", keys)
            raise EngramError(f"{name}: expected one that rounding leaves of the keys, got {ridge:g}")
        return half

    def held(self, keys: Tensor) -> Tensor:
        """Rows T with `TᵀT = Pᵀ (P Kᵀ)⁺ P`, `P = K Q`: what an infinite weight takes from Q."""
        # A key that earlier ones hold already has an answer of rounding, which must not be taken for one.
        energy = float(keys.double().square().sum(-1).max()) * self.scale
        if len(keys) >= self.dim:
            root = self._root()
            whitened = keys.double() @ root
            values, vectors = torch.linalg.eigh(whitened.T @ whitened)
            return (root @ vectors[:, self._kept(values, energy, len(keys))]).T
        product, gram = self._system(keys)
        values, vectors = torch.linalg.eigh(gram)
        kept = self._kept(values, energy, len(keys))
        turn = (vectors[:, kept] / values[kept].sqrt()).T
        rows = turn @ product
        # Orthonormal in the metric of Q only to the condition of the Gram matrix; once more, to rounding.
        again = rows @ (turn @ keys.double()).T
        return torch.linalg.solve_triangular(torch.linalg.cholesky((again + again.T) / 2), rows, upper=False)

    def _kept(self, values: Tensor, energy: float, count: int) -> Tensor:
        return values > max(count, self.dim) * _EPS * max(energy, float(values[-1]))

    def _root(self) -> Tensor:
        """L with `L Lᵀ = Q`."""
        root, sound = square_root(self.matrix(), _EPS * self.dim)
        if not bool(sound):
            raise EngramError(
                "matrix: expected a positive semidefinite one, got one with negative eigenvalues"
            )
        return root
