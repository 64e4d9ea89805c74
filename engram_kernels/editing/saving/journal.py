"""The folder of a run that can be cut off at any time and goes on to the same result."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..._io import load_cached, read_json, save_sealed_tensors, write_json
from ...errors import EngramError
from ...hf.loading import writable_directory
from ..search.values import Value
from ..writing.records import Write
from .files import read_writes, write_report, write_tensors

FORMAT = 4


class Journal:
    """Values and writes of a run, each kept as soon as it is there, by the number of its edit or batch.

    Args:
        directory: of the run, new or one that was left by a run of the same settings.
        settings: all that the result depends on, as JSON holds it.

    Raises:
        EngramError: the folder cannot be written, or belongs to a run of other settings or another version.
    """

    def __init__(self, directory: str | os.PathLike, settings: dict):
        self.directory = writable_directory(Path(directory), "directory")
        settings = json.loads(json.dumps({"format": FORMAT, **settings}))
        path = self.directory / "run.json"
        if not path.exists():
            # Values without it might be of any run. What was to become it lay under a name with a dot.
            if any(not path.name.startswith(".") for path in self.directory.iterdir()):
                raise EngramError(
                    f"directory: expected an empty one or a run's, got {str(self.directory)!r}, "
                    "which holds something else and no run.json"
                )
            write_json(path, settings)
        for name in ("values", "writes"):
            (self.directory / name).mkdir(exist_ok=True)
        try:
            known = read_json(path)
            if not isinstance(known, dict):
                raise ValueError("no object")
        except (OSError, ValueError) as error:
            raise EngramError(f"directory: expected a run's run.json, got {str(path)!r} ({error})") from error
        for name in {**known, **settings}:
            if known.get(name) != settings.get(name):
                raise EngramError(
                    f"directory: expected one of a run with the same {name}, got {str(self.directory)!r} "
                    f"with {known.get(name)!r} and not {settings.get(name)!r}; another call or version began "
                    f"it, and without it this run begins anew: rm -r {shlex.quote(str(self.directory))}"
                )

    def save_value(self, number: int, value: Value) -> None:
        """Keep the value of an edit."""
        tensors = {"keys": value.keys, "change": value.change}
        report = {"initial_norm": value.initial_norm, "losses": value.losses}
        _save(self._path("values", number), report, tensors)

    def load_value(self, number: int, device: torch.device) -> Value | None:
        """The value of an edit, or None where there is none that can be read."""
        entry = _load(self._path("values", number))
        if entry is None:
            return None
        report, tensors = entry
        return Value(**{name: tensor.to(device) for name, tensor in tensors.items()}, **report)

    def save_writes(self, batch: int, writes: Sequence[Write]) -> None:
        """Keep the writes of a batch."""
        tensors = write_tensors(writes, ("left", "right", "keys", "residuals"))
        _save(self._path("writes", batch), list(map(write_report, writes)), tensors)

    def load_writes(self, batch: int) -> list[Write] | None:
        """The writes of a batch, or None where there are none that can be read."""
        entry = _load(self._path("writes", batch))
        return None if entry is None else read_writes(*entry)

    def _path(self, kind: str, number: int) -> Path:
        return self.directory / kind / f"{number:06d}.safetensors"


def _save(path: Path, report: object, tensors: dict[str, Tensor]) -> None:
    save_sealed_tensors(path, tensors, {"report": json.dumps(report)})


def _load(path: Path) -> tuple | None:
    """The report and the tensors of a file; None where it is not there, or spoilt: it is computed again."""
    kept = load_cached(path)
    return kept and (json.loads(kept[1]["report"]), kept[0])
