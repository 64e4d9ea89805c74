"""The uncentred second moment of a layer's inputs, factored once and used for every edit."""

import os
import tempfile
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from . import _checks as check
from .backends.torch.rank_one import lost_pivot
from .errors import EngramError

_POWER_STEPS = 100


class Covariance:
    """`C = moment / count + ridge · mean(diag) · I`, held as its fp64 Cholesky factor `C = L Lᵀ`.

    An `in × in` solve never happens at edit time: `solve` is two triangular sweeps for the few keys of an
    edit. The factor is fp64 because the error of `C⁻¹` grows with the condition number, and covariances of
    transformer layers reach 1e6 and more.

    Attributes:
        factor: the lower Cholesky factor, fp64, [in, in] or [B, in, in].
        count: the number of samples that the moment sums over.
        ridge: the ridge, relative to the mean of the diagonal.

    Source: Meng et al. 2022 (arXiv 2202.05262), eq. 2 and appendix E.
    """

    def __init__(self, factor: Tensor, count: int, ridge: float):
        self.factor = factor
        self.count = count
        self.ridge = ridge

    @classmethod
    def from_second_moment(cls, moment: Tensor, count: int, ridge: float = 0.0) -> "Covariance":
        """Factor a second moment.

        Args:
            moment: Σ xᵀx as `second_moment_` accumulates it, [in, in] or [B, in, in], fp32 or fp64.
            count: the number of rows that went into it.
            ridge: added to the diagonal, in units of its mean.

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
        check.expect(count > 0, "count", "at least one sample", count)
        check.expect(0 <= ridge < float("inf"), "ridge", "a number of at least 0", ridge)
        check.finite("moment", moment)
        matrix = moment.double() / count
        matrix = (matrix + matrix.mT) / 2
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        mean = diagonal.mean(-1, keepdim=True)
        diagonal += ridge * mean
        factor, _ = torch.linalg.cholesky_ex(matrix)
        if bool(lost_pivot(factor, matrix).any()):
            width = matrix.shape[-1]
            # Under the rounding of the moment itself a ridge would only hide that nothing is known.
            enough = max(1e-6, 10 * width * torch.finfo(moment.dtype).eps)
            raise EngramError(
                f"moment: expected a positive definite matrix, got a singular one from {count} samples "
                f"for {width} dimensions with ridge {ridge:g}; give more samples, or a ridge of {enough:.0e} "
                "or more"
            )
        return cls(factor, count, ridge)

    @property
    def dim(self) -> int:
        """The number of dimensions, `in`."""
        return self.factor.shape[-1]

    def solve(self, keys: Tensor) -> Tensor:
        """Return `keys C⁻¹`, computed in fp64 and rounded once to the keys' type.

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
        check.same_device("keys", keys, self.factor.device)
        if self.factor.dim() == 3:
            check.expect(
                keys.dim() == 3 and keys.shape[0] == self.factor.shape[0],
                "keys",
                f"shape [{self.factor.shape[0]}, n, in], one set a covariance",
                list(keys.shape),
            )
            solved = torch.cholesky_solve(keys.double().mT, self.factor).mT
        else:
            # One factor for all: the batch is only more rows.
            solved = torch.cholesky_solve(keys.double().reshape(-1, self.dim).mT, self.factor).mT
        return solved.reshape(keys.shape).to(keys.dtype)

    def inverse(self) -> Tensor:
        """Return `C⁻¹` in fp64, [in, in] or [B, in, in]; stored in fp32 it would lose accuracy."""
        return torch.cholesky_inverse(self.factor)

    @cached_property
    def condition(self) -> float:
        """The 2-norm condition number, estimated by power iteration (a lower bound, close to it)."""
        return float((self._largest(self._multiply) * self._largest(self._divide)).max())

    def _multiply(self, vector: Tensor) -> Tensor:
        return self.factor @ (self.factor.mT @ vector)

    def _divide(self, vector: Tensor) -> Tensor:
        return torch.cholesky_solve(vector, self.factor)

    def _largest(self, function) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        shape = (*self.factor.shape[:-1], 1)
        vector = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.factor.device)
        for _ in range(_POWER_STEPS):
            vector = function(vector / vector.norm(dim=-2, keepdim=True))
        return vector.norm(dim=-2)

    def to(self, device: torch.device | str) -> "Covariance":
        """Return the covariance on another device."""
        return Covariance(self.factor.to(device), self.count, self.ridge)

    def save(self, path: str | os.PathLike) -> None:
        """Write the factor to a safetensors file, at once or not at all.

        Raises:
            OSError: the folder cannot be written.
        """
        from safetensors.torch import save_file

        path = Path(path)
        metadata = {
            "format": "engram_kernels.covariance",
            "count": str(self.count),
            "ridge": repr(self.ridge),
        }
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        os.close(handle)
        try:
            save_file({"factor": self.factor.contiguous()}, temporary, metadata)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> "Covariance":
        """Read a factor that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            EngramError: the file is not a covariance.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(
                f"path: expected a covariance file, got {os.fspath(path)!r}, which does not exist"
            )
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != "engram_kernels.covariance":
                    raise EngramError(
                        f"path: expected a covariance file, got {os.fspath(path)!r} of another format"
                    )
                return cls(file.get_tensor("factor"), int(metadata["count"]), float(metadata["ridge"]))
        except SafetensorError as error:
            raise EngramError(
                f"path: expected a covariance file, got {os.fspath(path)!r}: {error}"
            ) from error

    def __repr__(self) -> str:
        device = self.factor.device
        return f"Covariance(in={self.dim}, count={self.count}, ridge={self.ridge:g}, device={device})"
