"""A memory as a folder: `config.json`, and the tensors in a file that the configuration names."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _checks as check
from .._hashing import digest
from .._io import new_directory, new_file
from ..errors import EngramError
from .ledger import Entry, Ledger

if TYPE_CHECKING:
    from .episodic import EpisodicMemory

FORMAT = 1
KIND = "engram_kernels.memory.EpisodicMemory"
CONFIG = "config.json"
SETTINGS = ("slots", "latent", "batch", "ridge", "encoder")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in check.WEIGHT_DTYPES}
LATENTS = ("key", "value")
# What reading a file that is no memory, or no longer one, can raise.
_DAMAGE = (OSError, LookupError, StopIteration, TypeError, AttributeError, ValueError)


def save(memory: EpisodicMemory, directory: str | os.PathLike, replace: bool) -> None:
    """Write a memory; a folder that holds one already gets its new files first, and then their names.

    Raises:
        EngramError: the directory exists and holds something else, was changed by another since this memory
            read or wrote it, or cannot be written.
    """
    from safetensors.torch import save as serialise

    listed, rows = _ledger_parts(memory.ledger)
    state = {name: buffer.cpu().contiguous() for name, buffer in memory.named_buffers()}
    content = serialise(state | rows)
    checksum = hashlib.sha256(content).hexdigest()
    # Named by its content: until the configuration is replaced, the old one finds the old file untouched.
    weights = f"memory-{checksum[:16]}.safetensors"
    config = {
        "format": FORMAT,
        "kind": KIND,
        **{name: getattr(memory, name) for name in SETTINGS},
        "state_dtype": _name(memory.state_dtype),
        "weights": weights,
        "sha256": checksum,
        "ledger": listed,
    }
    config["checksum"] = digest(config)
    text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
    directory, seen = Path(directory), memory._folders
    old = _config(directory) if replace and (directory / CONFIG).is_file() else None
    if old is None:
        with new_directory(directory) as folder:
            (folder / weights).write_bytes(content)
            (folder / CONFIG).write_text(text, encoding="utf-8")
        seen[directory.resolve()] = config["checksum"]
        return
    if seen.get(directory.resolve(), old["checksum"]) != old["checksum"]:
        raise EngramError(
            f"directory: expected what this memory read or wrote there, got {str(directory)!r}, which "
            "another changed since; load it again and repeat the change, or save elsewhere"
        )
    try:
        with new_file(directory / weights) as temporary:
            temporary.write_bytes(content)
        with new_file(directory / CONFIG) as temporary:
            temporary.write_text(text, encoding="utf-8")
        seen[directory.resolve()] = config["checksum"]
        if old["weights"] != weights:
            (directory / old["weights"]).unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise EngramError(
            f"directory: expected one that can be written, got {str(directory)!r} ({reason})"
        ) from error


def load(directory: str | os.PathLike) -> EpisodicMemory:
    """Read what `save` wrote.

    Raises:
        EngramError: the folder holds no memory, or a file of it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as deserialise

    from .episodic import EpisodicMemory

    directory = Path(directory)
    config = _config(directory)
    try:
        content = (directory / config["weights"]).read_bytes()
        if hashlib.sha256(content).hexdigest() != config["sha256"]:
            raise ValueError(f"{config['weights']} is incomplete or was changed")
        tensors = deserialise(content)
        settings = {name: config[name] for name in SETTINGS}
        memory = EpisodicMemory(**settings, m0="identity", state_dtype=DTYPES[config["state_dtype"]])
        for name, buffer in memory.named_buffers():
            if tensors[name].shape != buffer.shape or tensors[name].dtype != buffer.dtype:
                raise ValueError(f"{name} has another shape or type than its configuration says")
            buffer.copy_(tensors[name])
        memory.ledger = _ledger(config["ledger"], tensors, memory)
        memory._folders[directory.resolve()] = config["checksum"]
        return memory
    except (*_DAMAGE, SafetensorError) as error:
        raise _foreign(directory, error) from error


def _config(directory: Path) -> dict:
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
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
        raise _foreign(directory, error) from error


def _foreign(directory: Path, error: Exception) -> EngramError:
    reason = f"no {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
    return EngramError(f"directory: expected a saved memory, got {str(directory)!r} ({reason})")


def _ledger_parts(ledger: Ledger) -> tuple[list[dict], dict[str, Tensor]]:
    """What JSON holds of each entry; and the latents, a matrix for each dtype, in the entries' order."""
    listed: list[dict] = []
    rows: dict[str, list[Tensor]] = {}
    for name, entry in ledger.items():
        line = {"id": name, "memory": entry.memory, "text": entry.text}
        for part in LATENTS:
            # A key that is the value is kept once.
            latent = None if part == "key" and entry.key is entry.value else getattr(entry, part)
            line[part] = None if latent is None else _name(latent.dtype)
            if latent is not None:
                rows.setdefault(f"{part}s.{line[part]}", []).append(latent.cpu())
        listed.append(line)
    return listed, {name: torch.stack(latents) for name, latents in rows.items()}


def _ledger(listed: list[dict], tensors: dict[str, Tensor], memory: EpisodicMemory) -> Ledger:
    waiting = {name: iter(rows) for name, rows in tensors.items()}
    device, entries, unnamed = memory.gram.device, {}, memory.count.tolist()
    for line in listed:
        parts = {
            part: next(waiting[f"{part}s.{line[part]}"]).clone().to(device) if line[part] else None
            for part in LATENTS
        }
        if parts["key"] is None:
            parts["key"] = parts["value"]
        entries[line["id"]] = Entry(line["memory"], **parts, text=line["text"])
        unnamed[line["memory"]] -= 1
    if len(entries) != len(listed) or min(unnamed) < 0:
        raise ValueError("its ledger has other rows than its state")
    return Ledger(entries)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
