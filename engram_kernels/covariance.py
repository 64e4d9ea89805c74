"""The uncentred second moment of a layer's inputs, inverted once and used for every edit."""

import os
from functools import cached_property

import torch
from torch import Tensor

from . import _checks as check
from ._io import read_tensor_folder, write_tensor_folder
from ._linalg import cholesky
from .errors import EngramError

KIND = "covariance"

# Each is a pass over the matrix; 20 come within a few percent on spectra that fall off slowly.
_POWER_STEPS = 20
_BLOCK = 1024


class Covariance:
    """`C = moment / count + ridge · mean(diag) · I`, held as its inverse in fp64.

    The in × in work is done once, by Cholesky; an edit then costs one product of its few keys with it.
    fp64, because the error of `C⁻¹` grows with the condition number, and covariances of transformer layers
    reach 1e6 and more: an inverse computed in fp32 would have lost all but two digits.

    Attributes:
        count: the number of samples that the moment sums over.
        ridge: the ridge, relative to the mean of the diagonal.

    Source: Meng et al. 2022 (arXiv 2202.05262), eq. 2 and appendix E.
    """

    def __init__(self, inverse: Tensor, largest: Tensor, count: int, ridge: float):
        self._inverse = inverse  # C⁻¹, [in, in] or [B, in, in]
        self._largest = largest  # the largest eigenvalue of C, [1] or [B, 1]
        self.count = count
        self.ridge = ridge

    @classmethod
    def from_second_moment(
        cls, moment: Tensor, count: int, ridge: float = 0.0, *, overwrite: bool = False
    ) -> "Covariance":
        """Invert a second moment.

        Args:
            moment: Σ xᵀx as `second_moment_` accumulates it, [in, in] or [B, in, in], fp32 or fp64.
            count: the number of rows that went into it.
            ridge: added to the diagonal, in units of its mean.
            overwrite: let the inverse take the moment's memory, where that is fp64 and contiguous: two
                matrices are in memory at the most, and not three. The moment is lost, after errors too.

        Returns:
            The covariance, on the moment's device.

        Raises:
            ValueError: wrong shape, count or ridge, or a moment that is not finite.
            EngramError: the moment is singular; the message names samples, dimensions and a ridge that would
                do.

        Example:
            >>> moment = torch.zeros(in_features, in_features, dtype=torch.float64)
            >>> ek.second_moment_(moment, inputs)
            >>> covariance = ek.Covariance.from_second_moment(moment, count=inputs.shape[0])
        """
        check.floating("moment", moment, (torch.float32, torch.float64))
        square = moment.dim() in (2, 3) and moment.shape[-1] == moment.shape[-2] and moment.shape[-1] > 0
        check.expect(square, "moment", "shape [in, in] or [B, in, in]", list(moment.shape))
        check.expect(isinstance(count, int), "count", "an integer", type(count).__name__, TypeError)
        check.expect(count > 0, "count", "at least one sample", count)
        check.number("ridge", ridge, at_least=0)
        check.finite("moment", moment)
        own = overwrite and moment.is_contiguous()
        matrix = moment.to(torch.float64, copy=not own, memory_format=torch.contiguous_format)
        matrix /= count
        _symmetrise_(matrix)
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        mean = diagonal.mean(-1, keepdim=True)
        diagonal += ridge * mean
        largest = _largest_eigenvalue(matrix)
        # A moment summed in fp32 is singular as far as fp32 can tell.
        factor, lost = cholesky(matrix, torch.finfo(moment.dtype).eps)
        if bool(lost.any()):
            width = matrix.shape[-1]
            # Under the rounding of the moment itself a ridge would only hide that nothing is known.
            enough = max(1e-6, 10 * width * torch.finfo(moment.dtype).eps)
            raise EngramError(
                f"moment: expected a positive definite matrix, got a singular one from {count} samples "
                f"for {width} dimensions with ridge {ridge:g}; give more samples, or a ridge of {enough:.0e} "
                "or more"
            )
        # LAPACK works in columns: in a transposed view it needs no memory of its own.
        torch.cholesky_inverse(factor, out=matrix.mT)
        return cls(matrix, largest, count, ridge)

    @property
    def dim(self) -> int:
        """The number of dimensions, `in`."""
        return self._inverse.shape[-1]

    def solve(self, keys: Tensor) -> Tensor:
        """Return `keys C⁻¹`, multiplied in fp64 and rounded once to the keys' type.

        Args:
            keys: [n, in] or [B, n, in], any floating type; differentiable.

        Returns:
            The preconditioned keys, of the same shape and type.

        Raises:
            ValueError: wrong shape or device.
        """
        check.floating("keys", keys)
        check.expect(keys.dim() in (2, 3), "keys", "shape [n, in] or [B, n, in]", list(keys.shape))
        check.expect(keys.shape[-1] == self.dim, "keys", f"{self.dim} columns (in)", keys.shape[-1])
        check.same_device("keys", keys, self._inverse.device)
        if self._inverse.dim() == 3:
            batch = self._inverse.shape[0]
            one_each = keys.dim() == 3 and keys.shape[0] == batch
            check.expect(one_each, "keys", f"shape [{batch}, n, in], one set a covariance", list(keys.shape))
        return (keys.double() @ self._inverse).to(keys.dtype)

    def inverse(self) -> Tensor:
        """Return `C⁻¹` in fp64, [in, in] or [B, in, in]; stored in fp32 it would lose accuracy."""
        return self._inverse

    @cached_property
    def condition(self) -> float:
        """The 2-norm condition number, estimated by power iteration (a lower bound, close to it)."""
        return float((self._largest * _largest_eigenvalue(self._inverse)).max())

    def to(self, device: torch.device | str) -> "Covariance":
        """Return the covariance on another device."""
        return Covariance(self._inverse.to(device), self._largest.to(device), self.count, self.ridge)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write the inverse, with count and ridge, into a new folder: all of it or nothing.

        Args:
            directory: a new or empty one.

        Raises:
            EngramError: the directory is not empty or cannot be written.

        Example:
            >>> covariance.save_pretrained("covariance-17")
        """
        tensors = {"inverse": self._inverse, "largest": self._largest}
        write_tensor_folder(directory, KIND, tensors, {"count": str(self.count), "ridge": repr(self.ridge)})

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike, device: torch.device | str = "cpu"
    ) -> "Covariance":
        """Read a folder that `save_pretrained` wrote.

        Args:
            directory: the folder.
            device: where the covariance shall lie.

        Returns:
            The covariance, bit for bit.

        Raises:
            ValueError: torch knows no such device.
            EngramError: the folder holds no covariance.

        Example:
            >>> covariance = ek.Covariance.from_pretrained("covariance-17", device="cuda")
        """
        return read_tensor_folder(directory, KIND, cls._read, device)

    @classmethod
    def _read(cls, tensors: dict[str, Tensor], about: dict[str, str]) -> "Covariance":
        """What a folder holds, where it can be a covariance."""
        inverse, largest = tensors["inverse"], tensors["largest"]
        for name, tensor in (("inverse", inverse), ("largest", largest)):
            check.floating(name, tensor, (torch.float64,))
            check.finite(name, tensor)
        square = inverse.dim() in (2, 3) and inverse.shape[-1] == inverse.shape[-2] > 0
        check.expect(square, "inverse", "shape [in, in] or [B, in, in]", list(inverse.shape))
        check.shape("largest", largest, (*inverse.shape[:-2], 1), "[1] or [B, 1]")
        count, ridge = int(about["count"]), float(about["ridge"])
        check.integer("count", count, at_least=1)
        check.number("ridge", ridge, at_least=0)
        return cls(inverse, largest, count, ridge)

    def __repr__(self) -> str:
        device = self._inverse.device
        return f"Covariance(in={self.dim}, count={self.count}, ridge={self.ridge:g}, device={device})"


def _symmetrise_(matrix: Tensor) -> None:
    """`M ← (M + Mᵀ) / 2`, block by block."""
    starts = range(0, matrix.shape[-1], _BLOCK)
    for i in starts:
        rows = slice(i, i + _BLOCK)
        for j in range(i, matrix.shape[-1], _BLOCK):
            columns = slice(j, j + _BLOCK)
            mean = (matrix[..., rows, columns] + matrix[..., columns, rows].mT) / 2
            matrix[..., rows, columns] = mean
            matrix[..., columns, rows] = mean.mT


def _largest_eigenvalue(matrix: Tensor) -> Tensor:
    """Estimate the largest eigenvalue of a positive matrix by power iteration, [1] or [B, 1]."""
    generator, shape = torch.Generator().manual_seed(0), (*matrix.shape[:-1], 1)
    vector = torch.randn(shape, generator=generator, dtype=matrix.dtype, device="cpu").to(matrix.device)
    for _ in range(_POWER_STEPS):
        vector = matrix @ (vector / vector.norm(dim=-2, keepdim=True))
    return vector.norm(dim=-2)
