"""Edits as a folder: a LoRA adapter that PEFT loads, and beside it what is needed to undo and redo them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _checks as check
from ..._io import read_sealed, save_tensors, write_sealed
from ...errors import EngramError
from ..edit import Edit
from ..health import Health
from ..writing.records import EditedModule, EditRecord, SkippedEdit, Write, joined_factors
from .adapter import CONFIG, FILE, load_adapter, save_adapter

FORMAT = 5
REPORT = "edit.json"
TENSORS = "edit.safetensors"
SEALED = (CONFIG, FILE, TENSORS)


class Content(NamedTuple):
    """What a folder holds."""

    records: list[EditRecord]
    writes: list[Write]
    edited_modules: list[EditedModule]
    skipped: list[SkippedEdit]
    health: list[Health]


def save_edits(folder: Path, content: Content) -> None:
    """Write the files of edits into a folder; `edit.json` holds the checksums of all."""
    report = {"format": FORMAT, "writes": list(map(write_report, content.writes))}
    for name in ("edited_modules", "records", "skipped", "health"):
        report[name] = list(map(asdict, getattr(content, name)))
    save_tensors(folder / TENSORS, write_tensors(content.writes, ("keys", "residuals")))
    factors = {
        edited.module: joined_factors(write for write in content.writes if write.module == edited.module)
        for edited in content.edited_modules
    }
    save_adapter(folder, content.edited_modules, factors)
    write_sealed(folder / REPORT, report, SEALED)


def load_edits(folder: Path) -> Content:
    """Read what `save_edits` wrote.

    Raises:
        EngramError: the folder does not hold saved edits, or a byte of them was changed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    faults = (OSError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, SafetensorError)
    try:
        report = read_sealed(folder / REPORT)
        if report["format"] != FORMAT:
            raise ValueError(f"format {report['format']}, not {FORMAT}")
        if missing := [name for name in SEALED if name not in report["files"]]:
            raise ValueError(f"{REPORT} has no checksum of {missing[0]}")
        tensors = load_file(folder / TENSORS)
        edited = [EditedModule(**entry) for entry in report["edited_modules"]]
        factors, used = load_adapter(folder, edited), dict.fromkeys((one.module for one in edited), 0)
        for number, entry in enumerate(report["writes"]):
            module, start = entry["module"], used[entry["module"]]
            used[module] = stop = start + len(entry["edits"])
            left, right = factors[module]
            tensors |= {f"{number}.left": left[:, start:stop], f"{number}.right": right[start:stop]}
        content = Content(
            records=[EditRecord(**with_edit(entry)) for entry in report["records"]],
            writes=read_writes(report["writes"], tensors),
            edited_modules=edited,
            skipped=[SkippedEdit(**with_edit(entry)) for entry in report["skipped"]],
            health=[Health(**entry) for entry in report["health"]],
        )
        _check(content, used, factors)
        return content
    except faults as error:
        raise EngramError(
            f"name_or_directory: expected saved edits, got {str(folder)!r} ({error})"
        ) from error


def with_edit(entry: Mapping) -> dict:
    """The fields of a record, with its edit built of its own."""
    return {**entry, "edit": Edit(**entry["edit"])}


def write_report(write: Write) -> dict:
    """What JSON holds of a write."""
    return {"module": write.module, "ridge": write.ridge, "edits": list(write.edits)}


def write_tensors(writes: Sequence[Write], names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of writes, named by their number."""
    tensors = {f"{i}.{name}": getattr(write, name) for i, write in enumerate(writes) for name in names}
    streams = {f"{i}.stream": write.stream for i, write in enumerate(writes) if write.stream is not None}
    return tensors | streams


def read_writes(reports: Sequence[Mapping], tensors: Mapping[str, Tensor]) -> list[Write]:
    """The writes whose parts `write_report` and `write_tensors` gave."""
    return [
        Write(
            module=report["module"],
            # Copies: the last bits of a product depend on how its factors are aligned.
            **{
                name: tensors[f"{number}.{name}"].clone(memory_format=torch.contiguous_format)
                for name in ("left", "right", "keys", "residuals")
            },
            ridge=None if report["ridge"] is None else float(report["ridge"]),
            edits=tuple(report["edits"]),
            stream=tensors.get(f"{number}.stream"),
        )
        for number, report in enumerate(reports)
    ]


def _check(content: Content, used: dict[str, int], factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Raise ValueError where the parts of saved edits do not belong together."""
    kinds = {
        "module": str, "layer": int, "transposed": bool, "base_checksum": str,
        "edited_checksum": str | None, "experts": int | None, "dtype": str,
    }  # fmt: skip
    for edited in content.edited_modules:
        for name, kind in kinds.items():
            if not isinstance(getattr(edited, name), kind):
                raise ValueError(f"{name} {getattr(edited, name)!r} is of the wrong kind")
        _, right = factors[edited.module]
        # Beyond a shorter one of several experts there are zeros.
        if not 0 < used[edited.module] <= len(right) or right[used[edited.module] :].any():
            raise ValueError(f"its adapter of {edited.module!r} has another rank than its writes")
    if not content.writes:
        raise ValueError("it has no writes")
    numbers = {number for write in content.writes for number in write.edits}
    if numbers != set(range(len(content.records))):
        raise ValueError(f"its writes are of the edits {sorted(numbers)} for {len(content.records)} records")
    for write in content.writes:
        rank = len(write.edits)
        out, width = write.left.shape[0], write.right.shape[-1]
        shapes = {
            "left": (out, rank),
            "right": (rank, width),
            "keys": (rank, width),
            "residuals": (rank, out),
        }
        for name, shape in shapes.items():
            tensor = getattr(write, name)
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
                raise ValueError(f"{name} of {write.module!r} is not a float32 matrix of {list(shape)}")
            if not check.is_finite(tensor):
                raise ValueError(f"{name} of {write.module!r} is not finite")
