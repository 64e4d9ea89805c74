"""What the keys of a write are multiplied with: one operator for every closed-form editor."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import _checks as check
from ._io import read_tensor_folder, write_tensor_folder
from ._linalg import compute_dtype, damped_root, square_root
from ._semidefinite import Semidefinite
from .covariance import Covariance
from .errors import EngramError
from .ops.define import apply
from .ops.low_rank_solve import ResidualGram, ResidualRidge, SmallSolve, check_weight
from .ops.waiting import raises_at_once

KIND = "preconditioner"
_EPS = torch.finfo(torch.float64).eps


class Preconditioner:
    """The matrix `Q [in, in]` of an associative write, symmetric and positive semidefinite, in fp64.

    Every closed-form editor writes

        ΔW = Eᵀ (λI + K Q Kᵀ)⁻¹ K Q R

    with a `Q`, a ridge `λ`, residuals `E [n, out]` and a factor `R [in, in]` of its own: `Q = C⁻¹` and λ = 0
    is ROME and EMMET, λ > 0 is MEMIT, a projection for `Q` AlphaEdit. docs/methods.md has all of them.

    `Q` is kept as a matrix, or a number for `c I`, with a sum of rank-one terms beside it: preserving n keys
    costs `n in²`, not `in³`, and leaves the matrix, which may be shared, as it is. From in/2 terms on they
    are added into a matrix; for n ≥ in it is made anew.

    An operator is never changed: each method returns another.

    Attributes:
        ridge: `λ` of `factors` where no other is given.

    Example:
        >>> operator = ek.Preconditioner.from_covariance(covariance, ridge=20.0).preserve(earlier_keys)
        >>> ek.apply_low_rank_(weight, *operator.factors(weight, keys, residual=residual))
    """

    def __init__(
        self,
        q: Semidefinite,
        ridge: float = 0.0,
        *,
        directions: Tensor | None = None,
        alpha: float = 0.0,
    ):
        self.ridge = ridge
        self._q = q
        # R = I − α UᵀU, U [r, in]; None: R = I.
        self._directions, self._alpha = directions, alpha

    # -- made of ---------------------------------------------------------------------------------------------

    @classmethod
    def from_covariance(
        cls, covariance: Covariance, weight: float = 1.0, identity: float = 0.0, ridge: float = 0.0
    ) -> Preconditioner:
        """Return `Q = (wC + μI)⁻¹`.

        Args:
            covariance: `C [in, in]`. Its inverse is shared where w = 1 and μ = 0, and nothing is computed.
            weight: `w`, at least 0: how many samples of the statistics a key counts for.
            identity: `μ`, at least 0, in the unit of `C`: keeps the whole matrix small.
            ridge: `λ`.

        Raises:
            TypeError: another type than a `Covariance`.
            ValueError: a batch of covariances, or a number out of range.

        Example:
            >>> operator = ek.Preconditioner.from_covariance(covariance, weight=1000.0, identity=20.0)

        Source: Gupta et al. 2025 (arXiv 2502.01636), ENCORE, for μ.
        """
        check.expect(
            isinstance(covariance, Covariance),
            "covariance",
            "a Covariance",
            type(covariance).__name__,
            TypeError,
        )
        inverse = covariance.inverse()
        check.dimensions("covariance", inverse, "[in, in]")
        check.number("weight", weight, at_least=0)
        check.number("identity", identity, at_least=0)
        check.expect(weight + identity > 0, "weight", "above 0, or an identity above 0", weight)
        check.number("ridge", ridge, at_least=0)
        if weight == 0:
            return cls(Semidefinite.of(1.0 / identity, covariance.dim, inverse.device), float(ridge))
        if identity > 0:
            # As keys of this size in every direction would make it: so C itself is not needed.
            keys = math.sqrt(identity) * torch.eye(covariance.dim, dtype=torch.float64, device=inverse.device)
            half, _ = damped_root(keys, square_root(inverse, _EPS)[0], weight)
            inverse = half.T @ half
        elif weight != 1:
            inverse = inverse / weight
        return cls(Semidefinite.of(inverse, covariance.dim, inverse.device), float(ridge))

    @classmethod
    def from_identity(
        cls, dim: int, scale: float = 1.0, ridge: float = 0.0, device: torch.device | str = "cpu"
    ) -> Preconditioner:
        """Return `Q = c I`, which needs no statistics and no memory.

        Args:
            dim: `in`.
            scale: `c`, above 0.
            ridge: `λ`.
            device: where keys will be.

        Raises:
            TypeError, ValueError: a number of the wrong kind or out of range.

        Example:
            >>> operator = ek.Preconditioner.from_identity(weight.shape[1], ridge=1.0)
        """
        check.integer("dim", dim, at_least=1)
        check.number("scale", scale, above=0)
        check.number("ridge", ridge, at_least=0)
        return cls(Semidefinite.of(float(scale), dim, torch.device(device)), float(ridge))

    @classmethod
    def from_matrix(cls, matrix: Tensor, ridge: float = 0.0) -> Preconditioner:
        """Return the operator of a given `Q`, such as a projection.

        Args:
            matrix: `Q [in, in]`, symmetric and positive semidefinite, fp32 or fp64.
            ridge: `λ`.

        Raises:
            TypeError, ValueError: no such matrix.

        Example:
            >>> operator = ek.Preconditioner.from_matrix(basis @ basis.T, ridge=10.0)
        """
        check.floating("matrix", matrix, (torch.float32, torch.float64))
        square = matrix.dim() == 2 and matrix.shape[0] == matrix.shape[1] > 0
        check.expect(square, "matrix", "shape [in, in]", list(matrix.shape))
        check.finite("matrix", matrix)
        check.number("ridge", ridge, at_least=0)
        apart = float((matrix - matrix.mT).abs().max())
        rounding = 1e-4 if matrix.dtype == torch.float32 else 1e-10
        check.expect(
            apart <= rounding * float(matrix.abs().max()),
            "matrix",
            "a symmetric one",
            f"halves {apart:.1g} apart",
        )
        wide = matrix.double()
        return cls(Semidefinite.of((wide + wide.mT) / 2, len(wide), matrix.device), float(ridge))

    def _with(self, **changes: Any) -> Preconditioner:
        """The same with something else of it."""
        parts = {"q": self._q, "ridge": self.ridge, "directions": self._directions, "alpha": self._alpha}
        return Preconditioner(**{**parts, **changes})

    # -- what it does ----------------------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        """The number of columns of the weights that it is for, `in`."""
        return self._q.dim

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self._q.rows.device

    def apply(self, keys: Tensor) -> Tensor:
        """Return `K Q`, multiplied in fp64 and rounded once to the keys' type.

        Args:
            keys: `[n, in]`, any floating type.

        Returns:
            The preconditioned keys, of the same shape and type.

        Raises:
            TypeError, ValueError: wrong type, shape or device.
        """
        self._check_keys(keys)
        return self._q.product(keys).to(keys.dtype)

    def matrix(self) -> Tensor:
        """Return `Q [in, in]` in fp64."""
        return self._q.matrix()

    @raises_at_once
    def factors(
        self,
        weight: Tensor,
        keys: Tensor,
        *,
        values: Tensor | None = None,
        residual: Tensor | None = None,
        ridge: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the factors of the write `ΔW = Eᵀ (λI + K Q Kᵀ)⁻¹ K Q R`.

        `E = V − K Wᵀ` is made of values, or given as a residual: then no entry of the weight is read.

        The factors are `Eᵀ S` and `K Q R`, with `S = (λI + K Q Kᵀ)⁻¹`, while keys are few. With a ridge they
        are `Eᵀ` and `S K Q R` from n = in/2 on: in fp32 the others would cancel too much. From n = in on they
        come of a factorisation of in × in, and memory grows with n, not with n².

        Args:
            weight: `W [out, in]`, fp32, bf16, fp16 or fp64.
            keys: `K [n, in]`, a key a row, any of these types.
            values: `V [n, out]`, what shall be answered. Or else:
            residual: `E [n, out]`, by how much each answer shall change.
            ridge: `λ`, at least 0; None: the operator's own.

        Returns:
            left `[out, n]` and right `[n, in]`, so that the edited weight is `weight + left @ right`. fp64
            for an fp64 weight, else fp32; the algebra is fp64 always.

        Raises:
            ValueError: wrong shape or device, a number that is not finite, a zero key without a ridge, values
                and residual both or neither.
            TypeError: wrong dtype.
            EngramError: dependent keys without a ridge, or keys whose whole span is held by earlier ones.

        Example:
            >>> left, right = operator.factors(weight, keys, residual=residual)
            >>> ek.apply_low_rank_(weight, left, right)
        """
        ridge = self.ridge if ridge is None else ridge
        given = self._check_factors(weight, keys, values, residual, ridge)
        dtype, count = compute_dtype(weight), len(keys)
        weight, keys, given = weight.detach(), keys.detach().to(dtype), given.detach().to(dtype)
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            if ridge > 0 and count >= self.dim:
                if values is not None:
                    given, right, _ = _first(ResidualRidge, weight, keys, given, self.matrix(), float(ridge))
                else:
                    half = self._q.damped(keys, ridge, "ridge")
                    right = keys.double() @ (half.T @ half)
                return given.T.contiguous(), self._multiplied(right).to(dtype)
            wide = keys.double()
            if values is not None:
                given, _ = _first(ResidualGram, weight, keys, given, wide)
            product = self._q.product(keys)
            system = product @ wide.T
            _check_energy(system.diagonal(), ridge)
            system = (system + system.T) / 2
            system.diagonal().add_(ridge)
            if ridge > 0 and 2 * count >= self.dim:
                return given.T.contiguous(), self._multiplied(_solve(system, product)).to(dtype)
            return _solve(system, given).T.contiguous(), self._multiplied(product).to(dtype)

    # -- what it becomes -------------------------------------------------------------------------------------

    def preserve(self, keys: Tensor, weight: float = 1.0) -> Preconditioner:
        """Return `(Q⁻¹ + w KᵀK)⁻¹`: later writes move the answers to these keys little, or not at all.

            Q − Pᵀ (I/w + P Kᵀ)⁻¹ P,   P = K Q             (Woodbury)

        An infinite weight gives the limit, `K Q = 0`: the answers stay exactly.

        Args:
            keys: `[n, in]`, the keys written before, any floating type.
            weight: `w > 0`, how much each counts; `math.inf`: beyond anything else.

        Returns:
            Another operator, which shares what is large with this one.

        Raises:
            TypeError, ValueError: wrong type, shape or device, keys that are not finite, a weight that is not
                positive.

        Example:
            >>> later = operator.preserve(keys, weight=1.0)

        Source: Hager 1989, "Updating the inverse of a matrix"; for infinite weights Lyu et al. 2025 (arXiv
            2510.13851), EvoEdit.
        """
        self._check_keys(keys)
        check.finite("keys", keys)
        check.expect(
            isinstance(weight, int | float) and not isinstance(weight, bool), "weight", "a number",
            type(weight).__name__, TypeError,
        )  # fmt: skip
        check.expect(weight > 0, "weight", "a positive number, or infinity", weight)
        return self if len(keys) == 0 else self._with(q=self._q.preserve(keys.detach(), weight))

    def release(self, keys: Tensor, weight: float = 1.0) -> Preconditioner:
        """Return `(Q⁻¹ − w KᵀK)⁻¹`: what `preserve` did for these keys, with this weight, taken back.

        What a large weight has taken of a key is lost to rounding: where less than 1e-4 of it is left, this
        is refused, so that eight digits hold always.

        Args:
            keys: `[n, in]`, n < in, keys that were preserved.
            weight: the weight they were preserved with, finite.

        Returns:
            Another operator.

        Raises:
            TypeError, ValueError: as for `preserve`, or an infinite weight.
            EngramError: the keys were not preserved with this weight, or too firmly to be told from nothing;
                make the operator anew without them.

        Example:
            >>> operator = operator.preserve(keys, weight=1.0).release(keys[3:4], weight=1.0)
        """
        self._check_keys(keys)
        check.finite("keys", keys)
        check.number("weight", weight, above=0)
        check.expect(len(keys) < self.dim, "keys", f"fewer than {self.dim} rows", len(keys))
        if len(keys) == 0:
            return self
        found = self._q.release(keys.detach(), weight)
        if found is None:
            raise EngramError(
                f"keys: expected ones that were preserved with the weight {weight:g}, of which 1e-4 is left, "
                "got others; make the operator anew without them"
            )
        return self._with(q=found)

    def within(self, neurons: Sequence[int] | Tensor) -> Preconditioner:
        """Return `Sᵀ (S Q⁻¹ Sᵀ)⁻¹ S`, S the rows of I of some neurons: only their columns are written.

        Args:
            neurons: indices of inputs of the layer, or a mask `[in]`.

        Returns:
            Another operator.

        Raises:
            TypeError, ValueError: no such indices, or none.

        Example:
            >>> operator = operator.within(keys.abs().sum(0).topk(100).indices)

        Source: Jiang et al. 2024 (arXiv 2410.04045), NSE.
        """
        neurons = torch.as_tensor(neurons, device=self.device)
        if neurons.dtype == torch.bool:
            check.shape("neurons", neurons, (self.dim,), "[in]")
            free = neurons.clone()
        else:
            check.expect(not neurons.is_floating_point(), "neurons", "integers", neurons.dtype, TypeError)
            check.dimensions("neurons", neurons, "[n]")
            inside = neurons.numel() == 0 or (int(neurons.min()) >= 0 and int(neurons.max()) < self.dim)
            check.expect(inside, "neurons", f"indices from 0 to {self.dim - 1}", neurons.tolist()[:8])
            free = torch.zeros(self.dim, dtype=torch.bool, device=self.device)
            free[neurons.long()] = True
        check.expect(bool(free.any()), "neurons", "at least one", "none")
        if self._q.free is not None:
            free &= self._q.free
        others = torch.eye(self.dim, dtype=torch.float64, device=self.device)[~free]
        # What is held to be zero is so to rounding, and by the mask exactly.
        return self._with(q=replace(self.preserve(others, math.inf)._q, free=free))

    def suppress(self, directions: Tensor, alpha: float = 1.0) -> Preconditioner:
        """Return the operator with `R = I − α UᵀU` behind it: updates lose that share in some directions.

        Args:
            directions: `U [r, in]`, orthonormal rows.
            alpha: the share that goes, from 0 to 1.

        Returns:
            Another operator.

        Raises:
            TypeError, ValueError: wrong type, shape or device, rows that are not orthonormal, or alpha out of
                range.

        Example:
            >>> operator = operator.suppress(torch.linalg.svd(weight).Vh[:16], alpha=0.5)

        Source: Liu et al. 2025 (arXiv 2510.01172), SPHERE.
        """
        self._check_keys(directions, "directions")
        check.number("alpha", alpha, at_least=0)
        check.expect(alpha <= 1, "alpha", "at most 1", alpha)
        wide = directions.detach().double()
        apart = wide @ wide.T - torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
        rounding = 1e-4 if directions.dtype != torch.float64 else 1e-10
        orthonormal = bool((apart.abs() <= rounding).all())
        check.expect(
            orthonormal, "directions", "orthonormal rows", f"rows {float(apart.abs().max()):.1g} off"
        )
        return self._with(directions=wide, alpha=float(alpha))

    def with_ridge(self, ridge: float) -> Preconditioner:
        """Return the operator with another ridge of its own."""
        check.number("ridge", ridge, at_least=0)
        return self._with(ridge=float(ridge))

    def to(self, device: torch.device | str) -> Preconditioner:
        """Return the operator on another device."""
        return self._of(self._numbers(), {name: part.to(device) for name, part in self._tensors().items()})

    # -- kept ------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write the operator into a new folder: all of it or nothing.

        Args:
            directory: a new or empty one.

        Raises:
            EngramError: the directory is not empty or cannot be written.

        Example:
            >>> operator.save_pretrained("layer-17")
        """
        write_tensor_folder(directory, KIND, self._tensors(), {"numbers": json.dumps(self._numbers())})

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike, device: torch.device | str = "cpu"
    ) -> Preconditioner:
        """Read a folder that `save_pretrained` wrote.

        Args:
            directory: the folder.
            device: where the operator shall lie.

        Returns:
            The operator, bit for bit.

        Raises:
            ValueError: torch knows no such device.
            EngramError: the folder holds no operator.

        Example:
            >>> operator = ek.Preconditioner.from_pretrained("layer-17", device="cuda")
        """
        return read_tensor_folder(directory, KIND, cls._read, device)

    @classmethod
    def _read(cls, tensors: dict[str, Tensor], about: dict[str, str]) -> Preconditioner:
        """What a folder holds, where it can be an operator."""
        numbers = json.loads(about["numbers"])
        check.integer("dim", numbers["dim"], at_least=1)
        for name in sorted(numbers.keys() - {"dim"}):
            check.number(name, numbers[name], at_least=0)
        dim, terms = numbers["dim"], len(tensors["rows"])
        shapes = {"base": (dim, dim), "rows": (terms, dim), "signs": (terms,), "free": (dim,)}
        shapes["directions"] = (len(tensors.get("directions", ())), dim)
        for name, tensor in tensors.items():
            check.tensor(name, tensor, (torch.bool if name == "free" else torch.float64,))
            check.shape(name, tensor, shapes[name], str(list(shapes[name])))
            check.finite(name, tensor)
        return cls._of(numbers, tensors)

    def _numbers(self) -> dict[str, float]:
        numbers = {"dim": self.dim, "ridge": self.ridge, "scale": self._q.scale, "alpha": self._alpha}
        return numbers if isinstance(self._q.base, Tensor) else {**numbers, "base": self._q.base}

    def _tensors(self) -> dict[str, Tensor]:
        q = self._q
        parts = {"base": q.base, "rows": q.rows, "signs": q.signs, "free": q.free}
        parts["directions"] = self._directions
        return {name: part for name, part in parts.items() if isinstance(part, Tensor)}

    @classmethod
    def _of(cls, numbers: dict[str, float], tensors: dict[str, Tensor]) -> Preconditioner:
        """Of what `_numbers` and `_tensors` gave."""
        known: dict[str, Any] = {**numbers, **tensors}
        q = Semidefinite(known["base"], known["rows"], known["signs"], known["scale"], known.get("free"))
        return cls(q, known["ridge"], directions=known.get("directions"), alpha=known["alpha"])

    def __repr__(self) -> str:
        kind = "matrix" if isinstance(self._q.base, Tensor) else f"{self._q.base:g} I"
        parts = [f"in={self.dim}", f"base={kind}", f"terms={len(self._q.rows)}", f"ridge={self.ridge:g}"]
        if self._q.free is not None:
            parts.append(f"neurons={int(self._q.free.sum())}")
        if self._directions is not None:
            parts.append(f"suppressed={len(self._directions)}")
        return f"Preconditioner({', '.join(parts)}, device={self.device})"

    def _multiplied(self, right: Tensor) -> Tensor:
        """The right factor, times R."""
        if self._directions is None:
            return right
        return torch.addmm(right, right @ self._directions.T, self._directions, alpha=-self._alpha)

    # -- checks ----------------------------------------------------------------------------------------------

    def _check_keys(self, keys: Tensor, name: str = "keys") -> None:
        check.floating(name, keys)
        check.dimensions(name, keys, "[n, in]")
        check.expect(keys.shape[-1] == self.dim, name, f"{self.dim} columns (in)", keys.shape[-1])
        check.same_device(name, keys, self.device)

    def _check_factors(
        self, weight: Tensor, keys: Tensor, values: Tensor | None, residual: Tensor | None, ridge: float
    ) -> Tensor:
        """Values or residual, whichever is given."""
        check_weight(weight)
        check.dimensions("weight", weight, "[out, in]")
        check.expect(weight.shape[1] == self.dim, "weight", f"{self.dim} columns (in)", weight.shape[1])
        check.same_device("weight", weight, self.device)
        self._check_keys(keys)
        given, name = (values, "values") if residual is None else (residual, "residual")
        if given is None or (values is not None and residual is not None):
            got = "neither" if given is None else "both"
            raise ValueError(f"residual: expected either it or values, got {got}")
        check.floating(name, given)
        check.shape(name, given, (len(keys), len(weight)), "[n, out]")
        check.same_device(name, given, self.device)
        check.finite("keys", keys)
        check.finite(name, given)
        zero = (keys == 0).all(-1).nonzero().flatten().tolist()
        check.expect(not zero, "keys", "no zero key", f"zeros in row {zero[0] if zero else None}")
        check.number("ridge", ridge, at_least=0)
        return given


def _check_energy(energy: Tensor, ridge: float) -> None:
    """Without a ridge each key needs an answer of its own."""
    held = (energy <= 0).nonzero().flatten().tolist()
    if held and ridge == 0:
        raise EngramError(
            f"keys: expected keys that can be written, got one, row {held[0]}, that earlier ones hold; "
            "give a ridge above 0"
        )


def _first(function: type[torch.autograd.Function], *arguments: Tensor | float) -> list[Tensor]:
    """What an operator for batches of matrices gives for one."""
    batch = (one.unsqueeze(0) if isinstance(one, Tensor) else one for one in arguments)
    return [one[0] for one in apply(function, *batch)]


def _solve(system: Tensor, right_hand_side: Tensor) -> Tensor:
    return apply(SmallSolve, system.unsqueeze(0), right_hand_side.unsqueeze(0), "cholesky")[0]
