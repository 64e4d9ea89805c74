"""Low-rank changes of matrices as a LoRA adapter that PEFT loads: `B = left`, `A = right`, scale 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..._io import save_tensors, write_json
from ..writing.records import EditedModule

CONFIG = "adapter_config.json"
FILE = "adapter_model.safetensors"
Factors = Mapping[str, tuple[Tensor, Tensor]]


def save_adapter(folder: Path, modules: Sequence[EditedModule], factors: Factors) -> None:
    """Write a folder that PEFT loads.

    Args:
        folder: to write into.
        modules: the matrices.
        factors: by module, `left [out, n]` and `right [n, in]`.
    """
    write_json(folder / CONFIG, _config(modules, factors))
    save_tensors(folder / FILE, _tensors(modules, factors), {"format": "pt"})


def load_adapter(folder: Path, modules: Sequence[EditedModule]) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of each module, as views of what the file holds."""
    from safetensors.torch import load_file

    tensors = load_file(folder / FILE)
    return {
        edited.module: _own(edited, tensors[_lora(edited, "B")], tensors[_lora(edited, "A")])
        for edited in modules
    }


def _config(modules: Sequence[EditedModule], factors: Factors) -> dict:
    """One rank a module, and no base model's name."""
    rank = _rank(factors)
    plain = [edited.module for edited in modules if edited.experts is None]
    ranks = {module: len(factors[module][1]) for module in plain}
    others = {module: count for module, count in ranks.items() if count != rank}
    # Only newer PEFT knows of parameters beside modules.
    fused = {edited.module.rpartition(".")[0] for edited in modules if edited.experts is not None}
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
        "fan_in_fan_out": any(edited.transposed for edited in modules),
        "target_modules": plain,
        **({"target_parameters": sorted(fused)} if fused else {}),
    }


def _tensors(modules: Sequence[EditedModule], factors: Factors) -> dict[str, Tensor]:
    """Under PEFT's names; the parts of experts that are not written are 0, and have the same rank."""
    tensors: dict[str, Tensor] = {}
    for edited in modules:
        left, right = factors[edited.module]
        name_left, name_right = _lora(edited, "B"), _lora(edited, "A")
        if edited.experts is None:
            tensors[name_left], tensors[name_right] = left, right
            continue
        rows = _rank(factors) * edited.experts
        whole_left = tensors.setdefault(name_left, left.new_zeros(left.shape[0], rows))
        whole_right = tensors.setdefault(name_right, right.new_zeros(rows, right.shape[1]))
        own_left, own_right = _own(edited, whole_left, whole_right)
        own_left[:, : left.shape[1]], own_right[: right.shape[0]] = left, right
    return tensors


def _rank(factors: Factors) -> int:
    return max(len(right) for _, right in factors.values())


def _lora(edited: EditedModule, factor: str) -> str:
    # PEFT wraps the module of all experts.
    module = edited.module if edited.experts is None else edited.module.rsplit(".", 2)[0]
    return f"base_model.model.{module}.lora_{factor}.weight"


def _own(edited: EditedModule, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """A module's own part of an adapter's tensors, as views `[out, rank]` and `[rank, in]`."""
    if edited.experts is None:
        return left, right
    number = int(edited.module.rpartition(".")[2])
    left = left.view(left.shape[0], -1, edited.experts)[..., number]
    return left, right.view(edited.experts, -1, right.shape[1])[number]
