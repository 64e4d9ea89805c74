"""The folder of a run that can be cut off at any time and goes on to the same result."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from .._io import new_file
from ..errors import EngramError
from ..hf.loading import writable_directory
from .files import TENSORS, write_tensors
from .result import Write
from .values import Value

FORMAT = 1


class Journal:
    """Values and writes of a run, each kept as soon as it is there, by the number of its edit or batch.

    Args:
        directory: of the run, new or one that was left by a run of the same settings.
        settings: all that the result depends on, as JSON holds it.

    Raises:
        EngramError: the folder cannot be written, or belongs to a run of other settings.
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
            with new_file(path) as temporary:
                temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for name in ("values", "writes"):
            (self.directory / name).mkdir(exist_ok=True)
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(known, dict):
                raise ValueError("no object")
        except (OSError, ValueError) as error:
            raise EngramError(f"directory: expected a run's run.json, got {str(path)!r} ({error})") from error
        for name in {**known, **settings}:
            if known.get(name) != settings.get(name):
                raise EngramError(
                    f"directory: expected one of a run with the same {name}, got {str(self.directory)!r} "
                    f"with {known.get(name)!r} and not {settings.get(name)!r}"
                )

    def save_value(self, number: int, value: Value) -> None:
        """Keep the value of an edit."""
        tensors = {
            "key": value.key,
            "bare_key": value.bare_key,
            "change": value.change,
            "initial_norm": torch.tensor(value.initial_norm, dtype=torch.float64),
            "losses": torch.tensor(value.losses, dtype=torch.float64),
        }
        _save(self._path("values", number), tensors)

    def load_value(self, number: int, device: torch.device) -> Value | None:
        """The value of an edit, or None where there is none that can be read."""
        tensors = _load(self._path("values", number))
        if tensors is None:
            return None
        return Value(
            key=tensors["key"].to(device),
            bare_key=tensors["bare_key"].to(device),
            change=tensors["change"].to(device),
            initial_norm=tensors["initial_norm"].item(),
            losses=tensors["losses"].tolist(),
        )

    def save_writes(self, batch: int, writes: Sequence[Write]) -> None:
        """Keep the writes of a batch."""
        report = [{"module": write.module, "ridge": write.ridge, "edits": write.edits} for write in writes]
        tensors = write_tensors(list(writes))
        tensors["report"] = torch.frombuffer(bytearray(json.dumps(report).encode()), dtype=torch.uint8)
        _save(self._path("writes", batch), tensors)

    def load_writes(self, batch: int) -> list[Write] | None:
        """The writes of a batch, or None where there are none that can be read."""
        tensors = _load(self._path("writes", batch))
        if tensors is None:
            return None
        report = json.loads(bytes(tensors["report"].tolist()))
        return [
            Write(
                **{name: tensors[f"{number}.{name}"] for name in TENSORS},
                module=entry["module"], ridge=entry["ridge"], edits=tuple(entry["edits"]),
            )
            for number, entry in enumerate(report)
        ]  # fmt: skip

    def _path(self, kind: str, number: int) -> Path:
        return self.directory / kind / f"{number:06d}.safetensors"


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save

    with new_file(path) as temporary:
        temporary.write_bytes(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))


def _load(path: Path) -> dict[str, torch.Tensor] | None:
    from safetensors.torch import load_file

    try:
        # Copies: the last bits of a product depend on how its factors are aligned.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except Exception:
        # Not there, or spoilt: it is computed again.
        return None
