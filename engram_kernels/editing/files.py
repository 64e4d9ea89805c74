"""Edits as a folder: a LoRA adapter that PEFT loads, and beside it what is needed to undo and redo them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from .._io import new_directory
from ..errors import EngramError
from .edit import Edit
from .result import EditRecord, EditResult, Site, SkippedEdit, Write

FORMAT = 2
ADAPTER = "adapter_model.safetensors"
TENSORS = ("left", "right", "keys", "changes")


def save_result(result: EditResult, directory: str | os.PathLike) -> None:
    """Write a result into a new directory.

    Raises:
        EngramError: the directory exists and is not empty, or cannot be written.
    """
    from safetensors.torch import save

    report = {
        "format": FORMAT,
        "sites": [
            {name: getattr(site, name) for name in ("module", "layer", "transposed", "experts", "dtype")}
            | {"base_checksum": site.base_checksum, "edited_checksum": site.edited_checksum}
            for site in result.sites
        ],
        "writes": [
            {"module": write.module, "ridge": write.ridge, "edits": list(write.edits)}
            for write in result.writes
        ],
        "records": [asdict(record) for record in result.records],
        "skipped": [asdict(skipped) for skipped in result.skipped],
    }
    with new_directory(directory) as folder:
        _write_json(folder / "edit.json", report)
        _write_json(folder / "adapter_config.json", adapter_config(result))
        # Not save_file, whose files only their owner may read.
        (folder / "edit.safetensors").write_bytes(save(write_tensors(result.writes, ("keys", "changes"))))
        (folder / ADAPTER).write_bytes(save(adapter_tensors(result), {"format": "pt"}))


def load_result(directory: str | os.PathLike) -> EditResult:
    """Read what `save_result` wrote.

    Raises:
        EngramError: the directory does not hold saved edits.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    directory = Path(directory)
    try:
        report = json.loads((directory / "edit.json").read_text(encoding="utf-8"))
        if report["format"] != FORMAT:
            raise EngramError(
                f"directory: expected an edit of format {FORMAT}, got format {report['format']}"
            )
        tensors = load_file(directory / "edit.safetensors")
        sites = [Site(**site) for site in report["sites"]]
        peft_tensors = load_file(directory / ADAPTER)
        adapter = {
            site.module: _own(site, *(peft_tensors[_lora(site, factor)] for factor in "BA")) for site in sites
        }
        writes, used = [], {site.module: 0 for site in sites}
        for number, entry in enumerate(report["writes"]):
            module, start = entry["module"], used[entry["module"]]
            used[module] = stop = start + len(entry["edits"])
            left, right = adapter[module]
            write = Write(
                module=module,
                left=left[:, start:stop].clone(memory_format=torch.contiguous_format),
                right=right[start:stop].clone(),
                keys=tensors[f"{number}.keys"].clone(),
                changes=tensors[f"{number}.changes"].clone(),
                ridge=float(entry["ridge"]),
                edits=tuple(entry["edits"]),
            )
            writes.append(write)
        records = [EditRecord(**{**record, "edit": Edit(**record["edit"])}) for record in report["records"]]
        skipped = [SkippedEdit(**{**entry, "edit": Edit(**entry["edit"])}) for entry in report["skipped"]]
        _check(records, writes, sites, used, adapter)
        return EditResult(records, writes, sites, skipped)
    except (
        OSError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
        SafetensorError,
    ) as error:
        raise EngramError(f"directory: expected saved edits, got {str(directory)!r} ({error})") from error


def adapter_config(result: EditResult) -> dict:
    """What PEFT needs to know: one rank a module, scale 1, no base model's name."""
    rank, plain = _rank(result), [site.module for site in result.sites if site.experts is None]
    ranks = {module: result.factors(module)[1].shape[0] for module in plain}
    others = {module: count for module, count in ranks.items() if count != rank}
    # Only newer PEFT knows of parameters beside modules.
    fused = [site.module.rpartition(".")[0] for site in result.sites if site.experts is not None]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(site.transposed for site in result.sites),
        "target_modules": plain,
        **({"target_parameters": sorted(set(fused))} if fused else {}),
    }


def adapter_tensors(result: EditResult) -> dict[str, torch.Tensor]:
    """The factors under PEFT's names; those of experts that are not written are 0, and have the same rank."""
    tensors = {}
    for site in result.sites:
        left, right = (factor.cpu().contiguous() for factor in result.factors(site.module))
        if site.experts is not None:
            (out, used), width, rows = left.shape, right.shape[1], _rank(result) * site.experts
            whole_left = tensors.get(_lora(site, "B"), left.new_zeros(out, rows))
            whole_right = tensors.get(_lora(site, "A"), left.new_zeros(rows, width))
            own_left, own_right = _own(site, whole_left, whole_right)
            own_left[:, :used], own_right[:used] = left, right
            left, right = whole_left, whole_right
        tensors[_lora(site, "A")], tensors[_lora(site, "B")] = right, left
    return tensors


def write_tensors(writes: list[Write], names: tuple[str, ...] = TENSORS) -> dict[str, torch.Tensor]:
    """Tensors of writes, named by their number."""
    return {
        f"{number}.{name}": getattr(write, name).cpu().contiguous()
        for number, write in enumerate(writes)
        for name in names
    }


def _rank(result: EditResult) -> int:
    return max(result.factors(site.module)[1].shape[0] for site in result.sites)


def _lora(site: Site, factor: str) -> str:
    # PEFT wraps the module of all experts.
    module = site.module if site.experts is None else site.module.rsplit(".", 2)[0]
    return f"base_model.model.{module}.lora_{factor}.weight"


def _own(site: Site, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A site's own part of an adapter's tensors, as views `[out, rank]` and `[rank, in]`."""
    if site.experts is None:
        return left, right
    number = int(site.module.rpartition(".")[2])
    left = left.view(left.shape[0], -1, site.experts)[..., number]
    return left, right.view(site.experts, -1, right.shape[1])[number]


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(records, writes: list[Write], sites: list[Site], used: dict[str, int], adapter: dict) -> None:
    """Raise ValueError where the parts of saved edits do not belong together."""
    for site in sites:
        for name, kinds in (
            ("module", str), ("layer", int), ("transposed", bool),
            ("base_checksum", str), ("edited_checksum", (str, type(None))), ("experts", (int, type(None))),
            ("dtype", (str, type(None))),
        ):  # fmt: skip
            if not isinstance(getattr(site, name), kinds):
                raise ValueError(f"{name} {getattr(site, name)!r} is of the wrong kind")
        _, right = adapter[site.module]
        # Beyond a shorter one of several experts there are zeros.
        if not 0 < used[site.module] <= len(right) or right[used[site.module] :].any():
            raise ValueError(f"its adapter of {site.module!r} has another rank than its writes")
    if not writes:
        raise ValueError("it has no writes")
    numbers = {number for write in writes for number in write.edits}
    if numbers != set(range(len(records))):
        raise ValueError(f"its writes are of the edits {sorted(numbers)} for {len(records)} records")
    for write in writes:
        rank = len(write.edits)
        out, width = write.left.shape[0], write.right.shape[-1]
        shapes = {"left": (out, rank), "right": (rank, width), "keys": (rank, width), "changes": (rank, out)}
        for name, shape in shapes.items():
            tensor = getattr(write, name)
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
                raise ValueError(f"{name} of {write.module!r} is not a float32 matrix of {list(shape)}")
