"""The files of a graft: `graft_config.json` and `graft_model.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .._io import read_sealed, save_tensors, write_sealed

FORMAT = 2
CONFIG = "graft_config.json"
WEIGHTS = "graft_model.safetensors"
CARD = "README.md"


def write_files(folder: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Write both files; the configuration holds the checksums of both.

    Raises:
        ValueError: the configuration has something that JSON has not.
    """
    save_tensors(folder / WEIGHTS, tensors)
    write_sealed(folder / CONFIG, {"format": FORMAT, **config}, [WEIGHTS])


def read_files(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """The configuration and the tensors that `write_files` wrote.

    Raises:
        OSError, KeyError, TypeError, ValueError, SafetensorError: they are not there, or were changed.
    """
    from safetensors.torch import load_file

    config = read_sealed(folder / CONFIG)
    if config["format"] != FORMAT:
        raise ValueError(f"its format is {config['format']}, not {FORMAT}")
    if WEIGHTS not in config["files"]:
        raise ValueError(f"{CONFIG} has no checksum of {WEIGHTS}")
    return config, load_file(folder / WEIGHTS)


def holds_a_graft(folder: Path) -> bool:
    """Whether a folder has a graft's files and nothing else, so that it may be replaced."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    return names <= {CONFIG, WEIGHTS, CARD} and (CARD not in names or CONFIG in names)
