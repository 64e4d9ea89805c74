"""A memory as one file of safetensors: the state, the ledger's latents, and the ledger as JSON.

One file, because one file can be exchanged in one step: no reader finds half of a change, and no writer that
dies leaves one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .._hashing import digest, tensor_bytes, tensor_checksum
from ..errors import EngramError
from . import storage
from .ledger import Entry, Id, Ledger
from .ridge import LOO, checked_ridge
from .state import checked_labels

FORMAT = 1
KIND = "engram_kernels.memory.EpisodicMemory"
# The entry of the file's metadata that has the settings, and the tensor that has the ledger.
SETTINGS, LEDGER = "memory", "ledger"
LATENTS = ("key", "value")
# What each fact has in JSON.
LINE = {"id", "memory", "text", "metadata", "rows", *LATENTS}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in check.WEIGHT_DTYPES}
# What reading a file that is no memory, or no longer one, can raise.
_DAMAGE = (
    OSError,
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
    OverflowError,
    RuntimeError,
    MemoryError,
)


class SavedMemory(NamedTuple):
    """What a folder holds.

    Attributes:
        settings: arguments of `EpisodicMemory`.
        state: its buffers by name.
        entries: its ledger's facts by id.
        checksum: of all of that.
    """

    settings: dict[str, Any]
    state: dict[str, Tensor]
    entries: dict[Id, Entry]
    checksum: str


def write(path: Path, settings: dict[str, Any], state: dict[str, Tensor], ledger: Ledger) -> str:
    """Write a memory's file, and return its checksum.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    lines, latents = _split(ledger)
    listed = torch.frombuffer(bytearray(_json(lines).encode()), dtype=torch.uint8)
    tensors = {LEDGER: listed, **latents}
    tensors |= {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    config = {"format": FORMAT, "kind": KIND, **settings, "state_dtype": _name(settings["state_dtype"])}
    config["checksum"] = _checksum(config, tensors)
    # safetensors writes for the owner alone; a folder may be shared, as far as the user's umask says.
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, {SETTINGS: _json(config)})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(mode)
    return config["checksum"]


def read(folder: Path) -> SavedMemory:
    """Read what `write` wrote: to the bit, or not at all.

    Raises:
        EngramError: the folder holds no memory, or its file is damaged.
    """
    try:
        return storage.read(folder / storage.FILE, _parsed)
    except _DAMAGE as error:
        raise refused(folder, error) from error


def read_checksum(folder: Path) -> str:
    """Read the checksum of what a folder holds, without looking at what it holds.

    Raises:
        EngramError: it holds no memory.
    """
    try:
        return storage.read(folder / storage.FILE, lambda content: _settings(content)["checksum"])
    except _DAMAGE as error:
        raise refused(folder, error) from error


def refused(folder: Path, error: Exception) -> EngramError:
    """The error for a folder that holds no memory."""
    reason = f"no {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
    if isinstance(error, RecursionError):
        reason = "it is nested too deeply"
    reason = " ".join(str(reason).split())
    return EngramError(f"directory: expected a saved memory, got {str(folder)!r} ({reason})")


def _parsed(content: bytes) -> SavedMemory:
    from safetensors import SafetensorError
    from safetensors.torch import load

    name = storage.FILE
    try:
        # It checks that shapes, types and offsets fit the bytes that are there, before anything is allocated.
        tensors = load(content)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{name} is incomplete or was changed") from error
    config = _settings(content)
    del content  # The tensors are copies.
    checksum = config.pop("checksum")
    _expect(checksum == _checksum(config, tensors), f"{name} is incomplete or was changed")
    settings = {key: value for key, value in config.items() if key not in ("format", "kind")}
    settings["state_dtype"] = _DTYPES[config["state_dtype"]]
    lines = json.loads(bytes(tensor_bytes(tensors.pop(LEDGER))))
    state = {name: tensor for name, tensor in tensors.items() if "." not in name}
    latents = {name: tensors.pop(name) for name in sorted(tensors.keys() - state.keys())}
    _check_settings(settings)
    _check_state(settings, state)
    entries = _joined(lines, latents, settings)
    _check_rows(settings, state, entries)
    return SavedMemory(settings, state, entries, checksum)


def _settings(content: bytes) -> dict[str, Any]:
    """The settings in a file's header, of a memory and of this format."""
    size = int.from_bytes(content[:8], "little")
    config = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][SETTINGS])
    if config["kind"] != KIND:
        raise ValueError(f"its kind is {config['kind']!r}")
    if config["format"] != FORMAT:
        raise ValueError(f"its format is {config['format']!r}, not {FORMAT}")
    return config


def _check_settings(settings: dict[str, Any]) -> None:
    """Check what tensors are held against; the rest `EpisodicMemory` checks when it is made."""
    expected = {"slots", "latent", "batch", "ridge", "state_dtype", "encoder", "labels"}
    _expect(settings.keys() == expected, "it has other settings")
    for name in ("slots", "latent", "batch"):
        check.integer(name, settings[name], at_least=1)
    _expect(isinstance(settings["labels"], list), "its labels are no list")
    checked_labels(settings["labels"], settings["batch"])
    settings["ridge"] = checked_ridge(settings["ridge"], settings["state_dtype"])


def _check_state(settings: dict[str, Any], state: dict[str, Tensor]) -> None:
    slots, latent, batch = (settings[name] for name in ("slots", "latent", "batch"))
    shapes = {
        "gram": (batch, slots, slots),
        "cross": (batch, slots, latent),
        "count": (batch,),
        "keyed": (batch,),
        "energy": (batch, 2),
        "ridges": (batch,),
        "m0": (slots, latent),
        "m0_pinv": (latent, slots),
    }
    _expect(state.keys() == shapes.keys(), "it has other tensors than a memory")
    for name, shape in shapes.items():
        tensor = state[name]
        dtype = torch.int64 if name in ("count", "keyed") else settings["state_dtype"]
        sound = tuple(tensor.shape) == shape and tensor.dtype == dtype
        _expect(sound, f"{name} has another shape or type than its settings say")
        _expect(check.is_finite(tensor), f"{name} is not finite")
    for name in ("count", "keyed", "energy"):
        _expect(bool((state[name] >= 0).all()), f"{name} is negative")
    ridge, ridges = settings["ridge"], state["ridges"]
    given = ridges if ridge == LOO else torch.full_like(ridges, ridge)
    _expect(
        bool((ridges > 0).all()) and torch.equal(ridges, given), "its ridges are not those of its settings"
    )
    # So that their sum is a number of rows too.
    _expect(sum(state["count"].tolist()) < 2**53, "it counts more rows than there can be")


def _check_rows(settings: dict[str, Any], state: dict[str, Tensor], entries: dict[Id, Entry]) -> None:
    unnamed = state["count"].tolist()
    for entry in entries.values():
        unnamed[entry.memory] -= len(entry.value)
    sound = min(unnamed) >= 0 and bool((state["keyed"] <= state["count"]).all())
    sound = sound and (settings["ridge"] != LOO or not any(unnamed))
    _expect(sound, "its ledger has other rows than its state")


def _split(ledger: Ledger) -> tuple[list[dict], dict[str, Tensor]]:
    """What JSON holds of each fact; and the latents, a matrix for each dtype, in the facts' order."""
    lines: list[dict] = []
    rows: dict[str, list[Tensor]] = {}
    for name, entry in ledger.items():
        line = {"id": name, "memory": entry.memory, "text": entry.text, "metadata": entry.metadata}
        line["rows"] = len(entry.value)
        for part in LATENTS:
            # A key that is the value is kept once.
            latents = None if part == "key" and entry.key is entry.value else getattr(entry, part)
            line[part] = None if latents is None else _name(latents.dtype)
            if latents is not None:
                rows.setdefault(f"{part}s.{line[part]}", []).append(latents.cpu())
        lines.append(line)
    return lines, {name: torch.cat(latents) for name, latents in rows.items()}


def _joined(lines: Any, latents: dict[str, Tensor], settings: dict[str, Any]) -> dict[Id, Entry]:
    """The facts that `_split` took apart, each with storage of its own."""
    _expect(isinstance(lines, list), "its ledger is no list")
    _json(lines).encode()  # No half characters, and no numbers that are not finite.
    taken = dict.fromkeys(latents, 0)

    def take(name: str, rows: int) -> Tensor:
        at = taken[name]
        taken[name] += rows
        _expect(taken[name] <= len(latents[name]), "its ledger has other rows than its latents")
        return latents[name][at : at + rows].clone()

    entries: dict[Id, Entry] = {}
    for line in lines:
        _expect(isinstance(line, dict) and line.keys() == LINE, "its ledger has something that is no fact")
        name, memory, text, known, rows = (line[key] for key in ("id", "memory", "text", "metadata", "rows"))
        sound = (
            isinstance(name, (str, int))
            and not isinstance(name, bool)
            and name not in entries
            and isinstance(text, (str, type(None)))
            and isinstance(known, (dict, type(None)))
        )
        _expect(sound, "its ledger has something that is no fact")
        check.integer("memory", memory, at_least=0)
        check.integer("rows", rows, at_least=1)
        _expect(memory < settings["batch"], "its ledger has facts of other memories")
        value = take(f"values.{line['value']}", rows)
        key = value if line["key"] is None else take(f"keys.{line['key']}", rows)
        entries[name] = Entry(memory, key, value, text, known)
    for name, tensor in latents.items():
        sound = tensor.dtype in _DTYPES.values() and name.partition(".")[2] == _name(tensor.dtype)
        sound = sound and tuple(tensor.shape) == (taken[name], settings["latent"])
        _expect(sound, f"{name} has another shape or type than its ledger says")
        _expect(check.is_finite(tensor), f"{name} is not finite")
    return entries


def _expect(sound: bool, otherwise: str) -> None:
    if not sound:
        raise ValueError(otherwise)


def _checksum(config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    return digest(config, {name: tensor_checksum(tensors[name]) for name in sorted(tensors)})


def _json(content: object) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
