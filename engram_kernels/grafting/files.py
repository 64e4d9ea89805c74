"""A graft as a folder: `graft_config.json` and `graft_model.safetensors`."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .._io import new_directory
from ..errors import EngramError

if TYPE_CHECKING:
    from .graft import Graft

FORMAT = 1
CONFIG = "graft_config.json"
WEIGHTS = "graft_model.safetensors"


def save(graft: Graft, directory: str | os.PathLike) -> None:
    from safetensors.torch import save as serialise

    tensors = {}
    for name, at in graft.indices.items():
        tensors |= {f"{name}.indices": at.contiguous(), f"{name}.values": graft.values[name].contiguous()}
    content = serialise(tensors)
    config = {
        "format": FORMAT,
        "base_model": graft.base_model,
        "base_revision": graft.base_revision,
        "entries": graft.size,
        "sparsity": graft.sparsity,
        "sha256": hashlib.sha256(content).hexdigest(),
        "recipe": graft.recipe,
        "metrics": graft.metrics,
        "parameters": {
            name: {"shape": list(shape), "base_checksum": graft.checksums[name]}
            for name, shape in graft.shapes.items()
        },
    }
    try:
        text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metrics: expected finite numbers, texts, lists and mappings, got others ({error})"
        ) from error
    with new_directory(directory) as folder:
        (folder / CONFIG).write_text(text, encoding="utf-8")
        (folder / WEIGHTS).write_bytes(content)


def load(name_or_directory: str | os.PathLike, revision: str | None = None) -> dict:
    """The attributes of the graft that lies in a folder or on the Hub."""
    from safetensors import SafetensorError
    from safetensors.torch import load as deserialise

    directory = _folder(name_or_directory, revision)
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        if config["format"] != FORMAT:
            raise ValueError(f"its format is {config['format']}, not {FORMAT}")
        content = (directory / WEIGHTS).read_bytes()
        if hashlib.sha256(content).hexdigest() != config["sha256"]:
            raise ValueError(
                f"{WEIGHTS} is incomplete or was changed: its checksum is not the one in {CONFIG}"
            )
        tensors = deserialise(content)
        names = [key.removesuffix(".indices") for key in tensors if key.endswith(".indices")]
        parameters = config["parameters"]
        attributes = {
            "indices": {name: tensors[f"{name}.indices"] for name in names},
            "values": {name: tensors[f"{name}.values"] for name in names},
            "shapes": {name: tuple(entry["shape"]) for name, entry in parameters.items()},
            "checksums": {name: entry["base_checksum"] for name, entry in parameters.items()},
            **{key: config[key] for key in ("base_model", "base_revision", "recipe", "metrics")},
        }
        _check(attributes)
        return attributes
    except (OSError, KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
        raise EngramError(
            f"name_or_directory: expected a saved graft, got {str(name_or_directory)!r} ({error})"
        ) from error


def push(graft: Graft, repo_id: str, private: bool | None, message: str) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "graft"
        save(graft, folder)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))


def _folder(name_or_directory: str | os.PathLike, revision: str | None) -> Path:
    if Path(name_or_directory).is_dir():
        return Path(name_or_directory)
    try:
        from huggingface_hub import snapshot_download

        files = [CONFIG, WEIGHTS]
        return Path(snapshot_download(str(name_or_directory), revision=revision, allow_patterns=files))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise EngramError(
            "name_or_directory: expected a folder or a repository on the Hub, "
            f"got {str(name_or_directory)!r} ({reason})"
        ) from error


def _check(attributes: dict) -> None:
    """Raise ValueError where positions are not ascending and inside, or do not belong to their values."""
    for name, at in attributes["indices"].items():
        if name not in attributes["shapes"]:
            raise ValueError(f"{name} is not among its parameters")
        size, values = torch.Size(attributes["shapes"][name]).numel(), attributes["values"][name]
        if at.dtype not in (torch.int32, torch.int64) or at.dim() != 1 or values.shape != at.shape:
            raise ValueError(f"{name} does not hold one value for each position")
        if at.numel() and not (0 <= int(at[0]) and int(at[-1]) < size and bool((at[1:] > at[:-1]).all())):
            raise ValueError(f"{name} has positions that are not ascending from 0 to {size - 1}")
