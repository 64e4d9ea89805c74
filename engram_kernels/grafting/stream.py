"""A stream of sparse deltas in a folder: from a trainer to the models that serve what it trains.

`stream.json` says which base the stream begins from; `000001.json` and `000001.safetensors` are the first
delta, and so on. Each delta names the file before it by its checksum, so that none is left out or exchanged,
and holds a digest of the values that it overwrites: a model in another state is refused, and left as it was.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks as check
from .._hashing import tensor_bytes, tensor_checksum
from .._io import file_checksum, new_directory, read_sealed, save_tensors, write_sealed
from ..errors import EngramError
from ..hf.placement import unwrapped, without_wrappers
from ..hf.weights import untied
from ..ops import sparse_apply_, sparse_diff
from ..ops.waiting import raises_at_once
from .parameters import tensors_of

FORMAT = 1
STREAM = "stream.json"


class Delta(NamedTuple):
    """What one write made: its number, how many entries changed in how many tensors, bytes, and seconds."""

    number: int
    entries: int
    tensors: int
    bytes: int
    detect: float
    pack: float


class DeltaWriter:
    """The trainer's end: writes what changed since the last time into a folder.

    It keeps a copy of the weights as they were written last, in the dtype that they are served in.

    Args:
        directory: a new or empty one.
        model: the trainer's, or its tensors by name, as they are in the base that is served.
        dtype: that the weights are served in. Default: each tensor's own.

    Attributes:
        number: of the last delta.

    Raises:
        EngramError: the directory is not empty, or the model has no weights.

    Example:
        >>> writer = DeltaWriter("deltas", model, torch.bfloat16)
        >>> for batch in batches:
        ...     train(model, batch)
        ...     writer.write(model)
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        model: nn.Module | Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
    ):
        self._folder, self._dtype, self.number = Path(directory), dtype, 0
        self._served = {name: tensor.clone() for name, tensor in self._weights(model).items()}
        check.expect(len(self._served) > 0, "model", "one with weights", "none")
        base = {
            name: {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "checksum": tensor_checksum(tensor),
            }
            for name, tensor in self._served.items()
        }
        with new_directory(self._folder) as folder:
            write_sealed(folder / STREAM, {"format": FORMAT, "base": base})
        self._previous = file_checksum(self._folder / STREAM)

    @raises_at_once
    def write(self, model: nn.Module | Mapping[str, Tensor]) -> Delta:
        """Write the next delta; one without entries where nothing changed.

        Raises:
            EngramError: a tensor is missing.
            ValueError: one has another shape.
        """
        start = time.perf_counter()
        weights, names = self._weights(model), list(self._served)
        missing = [name for name in names if name not in weights]
        if missing:
            raise EngramError(f"model: expected a tensor {missing[0]!r}, got none of that name")
        served = list(self._served.values())
        found = sparse_diff(served, [weights[name] for name in names])
        middle = time.perf_counter()
        some = [i for i, at in enumerate(found.indices) if at.numel()]
        at, values = [found.indices[i] for i in some], [found.values[i] for i in some]
        targets = [served[i] for i in some]
        overwritten = sparse_apply_(targets, at, values)
        number = self.number + 1
        tensors: dict[str, Tensor] = {}
        for i, where, value in zip(some, at, values, strict=True):
            tensors |= {f"{names[i]}.indices": where, f"{names[i]}.values": value}
        try:
            file = self._folder / f"{number:06d}.safetensors"
            save_tensors(file, tensors)
            path = self._folder / f"{number:06d}.json"
            content = {
                "format": FORMAT,
                "number": number,
                "previous": self._previous,
                "overwrites": _digest([names[i] for i in some], overwritten),
            }
            write_sealed(path, content, [file.name])
        except BaseException:
            sparse_apply_(targets, at, overwritten)  # the next one holds these entries too
            raise
        self.number, self._previous = number, file_checksum(path)
        entries = sum(map(len, at))
        return Delta(
            number, entries, len(some), file.stat().st_size, middle - start, time.perf_counter() - middle
        )

    def __repr__(self) -> str:
        return f"DeltaWriter({str(self._folder)!r}, {len(self._served)} tensors, at delta {self.number})"

    def _weights(self, model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = dict(unwrapped(model).named_parameters()) if isinstance(model, nn.Module) else dict(model)
        # Tied weights, which a state dict has under each of their names, are written once.
        return {
            name: tensor.detach().to(self._dtype or tensor.dtype)
            for name, tensor in untied(without_wrappers(named)).items()
        }


class DeltaReader:
    """The serving end: brings a model to the trainer's state, delta by delta, and back.

    Each delta is written whole or not at all. What deltas overwrote is kept, as much memory as they have
    entries, so that `rollback` needs no file.

    Args:
        directory: that a `DeltaWriter` writes into.
        model: as the stream's base.
        keep: how many deltas can be taken back. Default: all.

    Attributes:
        number: of the delta that the model stands at.

    Raises:
        EngramError: the folder holds no stream, or the model's weights are not its base's.

    Example:
        >>> reader = DeltaReader("deltas", model)
        >>> reader.pull()
        >>> reader.rollback(3)
    """

    def __init__(self, directory: str | os.PathLike, model: nn.Module, keep: int | None = None):
        if keep is not None:
            check.integer("keep", keep, at_least=0)
        self._folder, self._keep, self.number = Path(directory), keep, 0
        base = self._read(STREAM)["base"]
        self._weights = tensors_of(model, list(base), "model")
        for name, tensor in self._weights.items():
            if tensor_checksum(tensor) != base[name]["checksum"]:
                kind = f"{list(tensor.shape)} of {tensor.dtype}"
                raise EngramError(
                    f"model: expected in {name!r} the stream's base, got other weights ({kind})"
                )
        self._last = [file_checksum(self._folder / STREAM)]
        # Of each delta: names, positions, what it overwrote, and a digest of what it wrote.
        self._undo: list[tuple[list[str], list[Tensor], list[Tensor], str]] = []

    def pull(self, to: int | None = None) -> int:
        """Apply the deltas that were written since, in their order.

        Args:
            to: the last one to apply. Default: all that are there.

        Returns:
            The number of the delta that the model stands at then.

        Raises:
            ValueError: `to` lies before that.
            EngramError: a delta is missing, was changed, or does not follow the one before it, or the model
                was changed; the model stands where the last sound delta left it.
        """
        there = [int(path.stem) for path in self._folder.glob("*.json") if path.stem.isdecimal()]
        last = max([self.number, *there]) if to is None else to
        check.integer("to", last)
        check.expect(last >= self.number, "to", f"{self.number} or later: roll back first", last)
        for number in range(self.number + 1, last + 1):
            self._apply(number)
        return self.number

    @raises_at_once
    def rollback(self, to: int) -> None:
        """Take the deltas after one back, bit for bit.

        Raises:
            ValueError: the model is not past that one, or what it overwrote is no longer kept.
            EngramError: the model was changed by something else; it stands at `number`, the last delta that
                could not be taken back.
        """
        check.integer("to", to, at_least=0)
        first = self.number - len(self._undo)
        check.expect(first <= to <= self.number, "to", f"a delta from {first} to {self.number}", to)
        for names, at, values, written in reversed(self._undo[to - first :]):
            weights = [self._weights[name] for name in names]
            taken = sparse_apply_(weights, at, values)
            if _digest(names, taken) != written:
                sparse_apply_(weights, at, taken)
                raise EngramError(
                    f"model: expected the weights that delta {self.number} left, got others: "
                    "they were changed"
                )
            torch.clear_autocast_cache()
            self._undo.pop()
            self._last.pop()
            self.number -= 1

    def __repr__(self) -> str:
        return f"DeltaReader({str(self._folder)!r}, at delta {self.number}, {len(self._undo)} kept)"

    @raises_at_once
    def _apply(self, number: int) -> None:
        from safetensors.torch import load_file

        content = self._read(f"{number:06d}.json")
        if (content["number"], content["previous"]) != (number, self._last[-1]):
            raise EngramError(f"directory: expected delta {number} of this stream, got one of another")
        if list(content["files"]) != [f"{number:06d}.safetensors"]:
            raise EngramError(f"directory: expected the values of delta {number}, got none listed")
        tensors = load_file(self._folder / f"{number:06d}.safetensors")
        names = [key.removesuffix(".indices") for key in tensors if key.endswith(".indices")]
        unknown = [name for name in names if name not in self._weights]
        if unknown:
            raise EngramError(f"directory: expected weights of the stream's base, got {unknown[0]!r}")
        weights = [self._weights[name] for name in names]
        devices = {weight.device for weight in weights} or {torch.device("cpu")}
        check.expect(len(devices) == 1, "model", "one on a single device", f"{len(devices)} devices")
        (device,) = devices
        at = [tensors[f"{name}.indices"].to(device) for name in names]
        values = [tensors[f"{name}.values"].to(device) for name in names]
        overwritten = sparse_apply_(weights, at, values)
        if _digest(names, overwritten) != content["overwrites"]:
            sparse_apply_(weights, at, overwritten)
            raise EngramError(
                f"model: expected the weights that delta {number} was made for, got others: they were changed"
            )
        torch.clear_autocast_cache()
        self._undo.append((names, at, overwritten, _digest(names, values)))
        self._last.append(file_checksum(self._folder / f"{number:06d}.json"))
        self.number = number
        if self._keep is not None:
            del self._undo[: max(0, len(self._undo) - self._keep)]

    def _read(self, name: str) -> dict:
        try:
            content = read_sealed(self._folder / name)
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']}, not {FORMAT}")
            return content
        except (OSError, KeyError, ValueError) as error:
            raise EngramError(
                f"directory: expected {name} of a stream of deltas in {str(self._folder)!r}, "
                f"got none ({error})"
            ) from error


def _digest(names: Sequence[str], values: Sequence[Tensor]) -> str:
    """A digest of values by name, in whatever order they come."""
    digest = hashlib.sha256()
    for name, value in sorted(zip(names, values, strict=True), key=itemgetter(0)):
        digest.update(name.encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()
