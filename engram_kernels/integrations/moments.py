"""A covariance that remembers its factor, so that a system made of it need not be solved densely.

MEMIT's code asks for `(λC + K Kᵀ)⁻¹ K` by an `in × in` solve, layer after layer, call after call; EMMET's
for `(λC)⁻¹`. `C` is factored once, and then

    (λC + K Kᵀ)⁻¹ K = C⁻¹K (λI + Kᵀ C⁻¹ K)⁻¹

takes a system of `n × n`. The tensor that the library gets holds `C` itself, so that whatever else is done
with it is done as ever. What is remembered is a hint: an answer is held against the dense system, and where
it does not solve that, or nothing is remembered, the dense solve follows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import SupportsIndex

import torch
from torch import Tensor

_WIDENED = {Tensor.double, Tensor.to, Tensor.cpu, Tensor.cuda}
_SCALED = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
_SCALED_IN_PLACE = {Tensor.mul_, Tensor.__imul__}
_ADDED = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_INVERTED = {torch.inverse, torch.linalg.inv, Tensor.inverse}


class Factor:
    """The Cholesky factor of a covariance in fp64, and its inverse; computed once, kept on the CPU."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor | None] = {}

    def lower(self, covariance: Tensor) -> Tensor | None:
        """`L [in, in]` with `C = L Lᵀ`, where `C` lies; None where `C` is not positive definite."""
        if "lower" not in self._kept:
            matrix = covariance.double()
            lower, failed = torch.linalg.cholesky_ex((matrix + matrix.T) / 2)
            self._kept["lower"] = None if failed else lower.cpu()
        return self._on(covariance.device, "lower")

    def inverse(self, covariance: Tensor) -> Tensor | None:
        """`C⁻¹ [in, in]`, where `C` lies; None where `C` is not positive definite."""
        if "inverse" not in self._kept:
            lower = self.lower(covariance)
            self._kept["inverse"] = None if lower is None else torch.cholesky_inverse(lower).cpu()
        return self._on(covariance.device, "inverse")

    def _on(self, device: torch.device, name: str) -> Tensor | None:
        kept = self._kept[name]
        return None if kept is None else kept.to(device)


@dataclass(frozen=True)
class Origin:
    """How a tensor came from a covariance: `scale · C`, and `summed`: plus something.

    Attributes:
        covariance: `C`.
        factor: of `C`.
        version: of the tensor, which every change in place raises: then this holds no more.
    """

    covariance: Tensor
    factor: Factor
    version: int
    scale: float = 1.0
    summed: bool = False


class Moment(Tensor):
    """A covariance, or what was made of one, that knows its origin; an ordinary tensor otherwise."""

    origin: Origin | None = None

    @classmethod
    def of(cls, tensor: Tensor, origin: Origin) -> Moment:
        """The same memory, with an origin."""
        moment = tensor.detach().as_subclass(cls)
        moment.origin = replace(origin, version=moment._version)
        return moment

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            special = _special(func, args, kwargs or {})
            return func(*args, **(kwargs or {})) if special is None else special

    def __deepcopy__(self, memo: dict) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: SupportsIndex):
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def remembering(covariance: Tensor, factor: Factor) -> Tensor:
    """A covariance `[in, in]` that remembers its factor; its values, type and device are the same."""
    return Moment.of(covariance, Origin(covariance, factor, 0))


def _origin(value: object) -> Origin | None:
    """The origin of a tensor that has one and was not changed since."""
    if isinstance(value, Moment) and value.origin is not None and value.origin.version == value._version:
        return value.origin
    return None


def _special(func, args, kwargs) -> Tensor | None:
    """The result of the few functions that make use of an origin or hand it on; None for all others."""
    if func is torch.linalg.solve and len(args) == 2 and not kwargs:
        return _solve(*args)
    first = _origin(args[0]) if args else None
    if first is None:
        return None
    if func in _INVERTED and not kwargs:
        return _invert(args[0], first)
    if func in _WIDENED:
        result = func(*args, **kwargs)
        # In any other type the values are others, and elsewhere they are not with the covariance.
        same = result.dtype in (args[0].dtype, torch.float64) and result.device == args[0].device
        return Moment.of(result, first) if same else result
    if len(args) != 2 or kwargs or first.summed:
        return None
    other = args[1]
    if func in _SCALED | _SCALED_IN_PLACE and isinstance(other, (int, float)):
        result, scaled = func(*args), replace(first, scale=first.scale * other)
        if func in _SCALED:
            return Moment.of(result, scaled)
        args[0].origin = replace(scaled, version=args[0]._version)
        return args[0]
    if func in _ADDED and isinstance(other, Tensor) and other.shape == args[0].shape:
        return Moment.of(func(*args), replace(first, summed=True))
    return None


def _invert(matrix: Moment, origin: Origin) -> Tensor | None:
    """`(scale · C)⁻¹` from the factor; None where the dense inverse must do."""
    if origin.summed or origin.scale <= 0 or matrix.dtype != torch.float64:
        return None
    inverse = origin.factor.inverse(origin.covariance)
    if inverse is None:
        return None
    answer, right = inverse / origin.scale, _random(len(matrix), matrix)
    return answer if _solves(matrix, answer @ right, right) else None


def _solve(system: Tensor, keys: Tensor) -> Tensor | None:
    """`(scale · C + K Kᵀ)⁻¹ K` from the factor; None where the dense solve must do."""
    origin = _origin(system)
    if origin is None or not origin.summed or origin.scale <= 0:
        return None
    if system.dtype != torch.float64 or keys.dtype != torch.float64 or keys.dim() != 2:
        return None
    lower = origin.factor.lower(origin.covariance) if keys.shape[1] < len(keys) else None
    if lower is None:
        return None
    preconditioned = torch.cholesky_solve(keys, lower)
    small = keys.T @ preconditioned
    small = (small + small.T) / 2
    small.diagonal().add_(origin.scale)
    root, failed = torch.linalg.cholesky_ex(small)
    if failed:
        return None
    answer = torch.cholesky_solve(preconditioned.T, root).T
    weights = _random(keys.shape[1], keys)
    return answer if _solves(system, answer @ weights, keys @ weights) else None


def _solves(matrix: Tensor, x: Tensor, right: Tensor) -> bool:
    """Whether `A x = b`, as nearly as a backward stable solve has it: `‖A x − b‖ ≤ in · eps · ‖A‖ ‖x‖`."""
    error = (matrix @ x - right).norm()
    return bool(error <= len(x) * torch.finfo(x.dtype).eps * matrix.norm() * x.norm())


def _random(count: int, like: Tensor) -> Tensor:
    """Weights by which all columns of an answer are looked at in one; torch's random state stays as it is."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, generator=generator, dtype=like.dtype, device="cpu").to(like.device)
