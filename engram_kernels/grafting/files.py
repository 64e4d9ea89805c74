"""The files of a graft: `graft_config.json` and `graft_model.safetensors`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .._io import read_json, save_tensors, write_json

FORMAT = 1
CONFIG = "graft_config.json"
WEIGHTS = "graft_model.safetensors"
CARD = "README.md"


def write_files(folder: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Write both files; the configuration holds the other file's checksum.

    Raises:
        ValueError: the configuration has something that JSON has not.
    """
    save_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, {"format": FORMAT, "sha256": _sha256(folder), **config})


def read_files(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """The configuration and the tensors that `write_files` wrote.

    Raises:
        OSError, KeyError, TypeError, ValueError, SafetensorError: they are not there, or were changed.
    """
    from safetensors.torch import load_file

    config: Any = read_json(folder / CONFIG)
    if config["format"] != FORMAT:
        raise ValueError(f"its format is {config['format']}, not {FORMAT}")
    if _sha256(folder) != config["sha256"]:
        raise ValueError(f"{WEIGHTS} is incomplete or was changed: its checksum is not the one in {CONFIG}")
    return config, load_file(folder / WEIGHTS)


def holds_a_graft(folder: Path) -> bool:
    """Whether a folder has a graft's files and nothing else, so that it may be replaced."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    return names <= {CONFIG, WEIGHTS, CARD} and (CARD not in names or CONFIG in names)


def _sha256(folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
