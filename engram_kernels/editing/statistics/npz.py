"""Second moments in the `.npz` files of ROME's and MEMIT's code (`stats/<model>/<data>_stats/*_mom2_*.npz`).

Such a file holds the state of their running statistics: `mom2.mom2 [in, in]`, the sum of the outer products;
`mom2.count`, the number of tokens; `sample_size`, the number of texts, without which their code fails.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy
import torch

from ... import _checks as check
from ..._io import new_file
from ...errors import EngramError

# How their files say None: a NaN of these bits, since pickled objects are kept out.
NONE = numpy.array(0xFFF8000000000002, dtype=numpy.uint64).view(numpy.float64)


def load_npz(path: str | os.PathLike) -> tuple[torch.Tensor, int]:
    """Read a second moment that ROME's or MEMIT's code wrote, or `save_npz`.

    Args:
        path: of a file with `mom2.mom2` and `mom2.count`, beside others or not, or with `mom2` and `count`.

    Returns:
        `(moment, count)`: the sum `[in, in]`, float64 where the file has that, else float32, and the number
        of tokens.

    Raises:
        FileNotFoundError: there is no such file.
        EngramError: the file is of another kind, or what it holds cannot be a second moment.

    Example:
        >>> editor.use_covariance(17, Covariance.from_second_moment(*load_npz(path)))
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: expected an .npz file, got {name!r}, which does not exist")
    try:
        with open(path, "rb") as file, numpy.load(file, allow_pickle=False) as arrays:
            prefix = "mom2." if "mom2.mom2" in arrays.files else ""
            moment, count = arrays[prefix + "mom2"], int(arrays[prefix + "count"].item())
    except Exception as error:
        # A single array, a damaged archive, pickled objects, other names: numpy has an error for each.
        raise EngramError(
            f"path: expected an .npz file with a second moment and its count, got {name!r} ({error})"
        ) from error
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1] or moment.dtype.kind != "f" or not moment.size:
        got = f"{moment.dtype} of shape {list(moment.shape)}"
        raise EngramError(f"path: expected a square second moment of floats, got {got} in {name!r}")
    if count < 1:
        raise EngramError(f"path: expected a count of at least 1, got {count} in {name!r}")
    if not numpy.isfinite(moment).all():
        raise EngramError(f"path: expected a finite second moment, got NaN or infinity in {name!r}")
    wide = numpy.float64 if moment.dtype.itemsize >= 8 else numpy.float32
    return torch.from_numpy(numpy.ascontiguousarray(moment, dtype=wide)), count


def save_npz(
    path: str | os.PathLike, moment: torch.Tensor, count: int, sample_size: int | None = None
) -> None:
    """Write a second moment as ROME's and MEMIT's code reads it, at once or not at all.

    Args:
        path: of the file; its folder is made.
        moment: the sum of the outer products `[in, in]`, float32 or float64; not divided by the count.
        count: the number of tokens.
        sample_size: the number of texts, which their code compares with what it was asked for, the last
            number in the file's name; None: all texts there were, and no number in the name.

    Raises:
        TypeError: `count` or `sample_size` is no integer, or `moment` no float32 or float64 tensor.
        ValueError: `moment` is not square or not finite, or a number is less than 1.
        OSError: the file cannot be written.

    Example:
        >>> save_npz(f"{module}_float64_mom2_{texts}.npz", moment, count, sample_size=texts)
    """
    check.floating("moment", moment, (torch.float32, torch.float64))
    square = moment.dim() == 2 and moment.shape[0] == moment.shape[1] and moment.numel() > 0
    check.expect(square, "moment", "shape [in, in]", list(moment.shape))
    check.finite("moment", moment)
    for name, number in (("count", count), ("sample_size", 1 if sample_size is None else sample_size)):
        check.integer(name, number)
        check.expect(number > 0, name, "at least 1", number)
    arrays = {
        "mom2.constructor": numpy.array("util.runningstats.SecondMoment()"),
        "mom2.count": numpy.array(count),
        "mom2.mom2": moment.detach().cpu().numpy(),
        "sample_size": NONE if sample_size is None else numpy.array(sample_size),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary, open(temporary, "wb") as file:
        numpy.savez(file, **arrays)
