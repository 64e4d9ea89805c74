"""A memory as a folder: `config.json`, and the tensors in a file that the configuration names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .._hashing import digest, tensor_checksum
from .._io import read_json, save_tensors, write_json
from ..errors import EngramError
from .ledger import Entry, Id, Ledger

FORMAT = 1
KIND = "engram_kernels.memory.EpisodicMemory"
CONFIG = "config.json"
LATENTS = ("key", "value")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in check.WEIGHT_DTYPES}
# What reading a file that is no memory, or no longer one, can raise.
_DAMAGE = (OSError, LookupError, StopIteration, TypeError, AttributeError, ValueError)


class SavedMemory(NamedTuple):
    """What a folder holds.

    Attributes:
        settings: arguments of `EpisodicMemory`.
        state: its buffers by name.
        entries: its ledger's rows by id.
    """

    settings: dict
    state: dict[str, Tensor]
    entries: dict[Id, Entry]


def write(directory: Path, settings: dict, state: dict[str, Tensor], ledger: Ledger) -> None:
    """Write a memory into an empty folder, or in place of the one that the folder holds.

    The configuration is exchanged last: until then the old one finds its old file untouched.

    Raises:
        OSError: a file cannot be written.
    """
    listed, latents = _split(ledger)
    tensors = state | latents
    checksum = _checksum(tensors)
    weights = f"memory-{checksum[:16]}.safetensors"
    config = {
        "format": FORMAT,
        "kind": KIND,
        **settings,
        "state_dtype": _name(settings["state_dtype"]),
        "weights": weights,
        "sha256": checksum,
        "ledger": listed,
    }
    old = read_config(directory)["weights"] if (directory / CONFIG).is_file() else weights
    save_tensors(directory / weights, tensors)
    write_json(directory / CONFIG, config | {"checksum": digest(config)})
    if old != weights:
        (directory / old).unlink(missing_ok=True)


def read(directory: Path) -> SavedMemory:
    """Read what `write` wrote.

    Raises:
        EngramError: the folder holds no memory, or a file of it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    config = read_config(directory)
    damaged = f"{config['weights']} is incomplete or was changed"
    try:
        tensors = load((directory / config["weights"]).read_bytes())
        if _checksum(tensors) != config["sha256"]:
            raise ValueError(damaged)
        names = ("slots", "latent", "batch", "ridge", "encoder")
        settings = {name: config[name] for name in names}
        settings["state_dtype"] = _DTYPES[config["state_dtype"]]
        return SavedMemory(settings, tensors, _joined(config["ledger"], tensors))
    except SafetensorError as error:
        raise refused(directory, ValueError(damaged)) from error
    except _DAMAGE as error:
        raise refused(directory, error) from error


def read_config(directory: Path) -> dict:
    """Read a memory's configuration.

    Raises:
        EngramError: the folder holds no memory, or its configuration was changed.
    """
    try:
        config = read_json(directory / CONFIG)
        if config["kind"] != KIND:
            raise ValueError(f"its kind is {config['kind']!r}")
        if config["format"] != FORMAT:
            raise ValueError(f"its format is {config['format']!r}, not {FORMAT}")
        content = {name: value for name, value in config.items() if name != "checksum"}
        if config["checksum"] != digest(content):
            raise ValueError(f"{CONFIG} was changed")
        # It is read, and deleted when the memory is replaced: never a path to somewhere else.
        if not re.fullmatch(r"memory-[0-9a-f]{16}\.safetensors", config["weights"]):
            raise ValueError(f"its tensors are in {config['weights']!r}")
        return config
    except _DAMAGE as error:
        raise refused(directory, error) from error


def refused(directory: Path, error: Exception) -> EngramError:
    """The error for a folder that holds no memory."""
    reason = f"no {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
    return EngramError(f"directory: expected a saved memory, got {str(directory)!r} ({reason})")


def _split(ledger: Ledger) -> tuple[list[dict], dict[str, Tensor]]:
    """What JSON holds of each entry; and the latents, a matrix for each dtype, in the entries' order."""
    listed: list[dict] = []
    rows: dict[str, list[Tensor]] = {}
    for name, entry in ledger.items():
        line = {"id": name, "memory": entry.memory, "text": entry.text, "metadata": entry.metadata}
        line["rows"] = len(entry.value)
        for part in LATENTS:
            # A key that is the value is kept once.
            latent = None if part == "key" and entry.key is entry.value else getattr(entry, part)
            line[part] = None if latent is None else _name(latent.dtype)
            if latent is not None:
                rows.setdefault(f"{part}s.{line[part]}", []).append(latent.cpu())
        listed.append(line)
    return listed, {name: torch.cat(latents) for name, latents in rows.items()}


def _joined(listed: list[dict], tensors: dict[str, Tensor]) -> dict[Id, Entry]:
    """The entries that `_split` took apart, each with storage of its own."""
    taken = dict.fromkeys(tensors, 0)

    def take(name: str, rows: int) -> Tensor:
        at = taken[name]
        taken[name] += rows
        return tensors[name][at : at + rows].clone()

    entries: dict[Id, Entry] = {}
    for line in listed:
        key, value = (take(f"{part}s.{line[part]}", line["rows"]) if line[part] else None for part in LATENTS)
        key = value if key is None else key
        entries[line["id"]] = Entry(line["memory"], key, value, line["text"], line["metadata"])
    if len(entries) != len(listed):
        raise ValueError("its ledger has other rows than its state")
    return entries


def _checksum(tensors: dict[str, Tensor]) -> str:
    return digest({name: tensor_checksum(tensors[name]) for name in sorted(tensors)})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
