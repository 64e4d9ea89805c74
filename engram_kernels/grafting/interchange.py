"""Grafts as other libraries' sparse weight updates, and back.

- `weight_patches`, `from_patches`: vLLM's `CheckpointWeightPatch` and `SparseWeightPatch`, as its pull
  requests 50723 and 53751 define them.
- `save_trl`, `read_trl`: TRL's delta files, `sparse_weight_patch` version 1, as its `delta_codec.py` and
  `delta_engine.py` write them.
- `save_slime`, `read_slime`: slime's disk deltas of the encoding `overwrite`, as its `disk_delta.py` applies
  them.
- `save_shira`: PEFT's SHiRA adapters. `localize` and all that takes a fine-tuned model reads them.

All but SHiRA hold absolute values at row-major positions, as grafts do; SHiRA adds. None of them knows the
base's checksums: what is read is a graft for the base that is given.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks as check
from .._io import new_directory, save_tensors, write_json
from ..errors import EngramError
from .graft import Graft
from .parameters import tensors_of

Base = nn.Module | Mapping[str, Tensor]


class WeightPatch(NamedTuple):
    """One parameter's changed entries, with the fields of vLLM's `CheckpointWeightPatch`.

    Attributes:
        name: of the weight in a checkpoint.
        shape: of the whole weight; vLLM's `SparseWeightPatch` calls it `full_shape`.
        dtype: of the weight.
        values: `[n]`.
        indices: `[n]`, row-major positions in the whole weight.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor
    indices: Tensor


def weight_patches(graft: Graft) -> list[WeightPatch]:
    """A graft as vLLM's patches in checkpoint coordinates.

    Args:
        graft: whose values are finite or infinite, but not NaN.

    Returns:
        A patch for each parameter.

    Example:
        >>> load_checkpoint_weight_patches(model, weight_patches(graft))  # vLLM's own

    Raises:
        EngramError: a value is NaN, which is how vLLM marks what stays.
    """
    for name, values in graft.values.items():
        if bool(values.isnan().any()):
            raise EngramError(f"graft: expected no NaN, which vLLM takes as unchanged, got one in {name!r}")
    return [
        WeightPatch(name, tuple(graft.shapes[name]), graft.values[name].dtype, graft.values[name], at)
        for name, at in graft.indices.items()
    ]


def from_patches(patches: Iterable[WeightPatch], base: Base) -> Graft:
    """A graft of patches such as vLLM's: anything with a name, indices and values, in any order.

    Args:
        patches: one for each parameter.
        base: what they are applied to.

    Returns:
        The graft, with the checksums of that base.

    Raises:
        EngramError: two patches of one parameter, or one that does not fit the base.
    """
    entries: dict[str, tuple[Tensor, Tensor]] = {}
    for patch in patches:
        if patch.name in entries:
            raise EngramError(f"patches: expected one for each parameter, got two for {patch.name!r}")
        entries[patch.name] = patch.indices, patch.values
    return _of_entries(base, entries, "patches")


# -- TRL -----------------------------------------------------------------------------------------------------


def save_trl(graft: Graft, path: str | os.PathLike, version: int, encoding: str = "gap_delta") -> None:
    """Write a graft as one of TRL's delta files: `<name>.idx` and `<name>.val`, values in bf16.

    Args:
        graft: of a bf16 base, as TRL serves bf16 alone.
        path: a safetensors file, such as `deltas/step_000001.safetensors`.
        version: of the model that the delta leads to.
        encoding: of the positions: "gap_delta" (two bytes each where they lie close) or "raw" (int32).

    Raises:
        ValueError: an unknown encoding.
        EngramError: values of another dtype.
    """
    check.expect(encoding in ("gap_delta", "raw"), "encoding", "'gap_delta' or 'raw'", repr(encoding))
    check.integer("version", version, at_least=0)
    tensors: dict[str, Tensor] = {}
    for name, at in graft.indices.items():
        values = graft.values[name]
        if values.dtype != torch.bfloat16:
            raise EngramError(f"graft: expected bfloat16, which TRL serves, got {values.dtype} in {name!r}")
        tensors[f"{name}.idx"] = _gaps(at) if encoding == "gap_delta" else at.int()
        tensors[f"{name}.val"] = values
    total = sum(torch.Size(graft.shapes[name]).numel() for name in graft.indices)
    metadata = {
        "format": "sparse_weight_patch",
        "version": 1,
        "sparse": True,
        "model_version": version,
        "num_changed_params": len(graft.indices),
        "total_changed_elements": graft.size,
        "total_elements": total,
        "sparsity": 1.0 - graft.size / max(total, 1),
        "encoding": encoding,
    }
    save_tensors(path, tensors, {name: str(value) for name, value in metadata.items()})


def read_trl(path: str | os.PathLike, base: Base) -> Graft:
    """Read one of TRL's delta files as a graft of a base.

    Args:
        path: the safetensors file.
        base: the tensors before.

    Returns:
        The graft, which is applied to that base.

    Raises:
        EngramError: it is none, is encoded by nvCOMP, or does not fit the base.
    """
    from safetensors import SafetensorError, safe_open

    try:
        entries = {}
        with safe_open(path, framework="pt") as file:
            encoding = (file.metadata() or {}).get("encoding")
            if encoding not in ("gap_delta", "raw"):
                raise ValueError(f"positions are encoded as {encoding!r}")
            for key in file.keys():
                if key.endswith(".val"):
                    name = key.removesuffix(".val")
                    at = file.get_tensor(f"{name}.idx")
                    entries[name] = (at if encoding == "raw" else _positions(at), file.get_tensor(key))
    except (OSError, ValueError, SafetensorError) as error:
        raise EngramError(f"path: expected a delta file of TRL, got {str(path)!r} ({error})") from error
    return _of_entries(base, entries, "path")


def _gaps(at: Tensor) -> Tensor:
    """How many entries lie between each position and the one before it, in two bytes or in four."""
    gaps = torch.diff(at.long(), prepend=torch.tensor([-1])) - 1
    return gaps.to(torch.uint16 if not len(gaps) or int(gaps.max()) <= 0xFFFF else torch.uint32)


def _positions(gaps: Tensor) -> Tensor:
    return (gaps.long() + 1).cumsum(0) - 1


# -- slime ---------------------------------------------------------------------------------------------------


def save_slime(
    graft: Graft, base: Base, directory: str | os.PathLike, version: int, base_version: int | None = None
) -> None:
    """Write a graft as one of slime's disk deltas, `overwrite`: positions of bytes, and bytes.

    Args:
        graft: made for `base`.
        base: the tensors before; a checksum of each whole tensor after goes into the files.
        directory: a new one, such as `weight_v000001`.
        version: of the model that the delta leads to.
        base_version: that it builds on. Default: the one before.

    Raises:
        EngramError: zstandard is missing, or the directory is not empty.
    """
    zstandard = _zstandard()
    check.integer("version", version, at_least=1)
    before = version - 1 if base_version is None else base_version
    tensors, checksums = {}, {}
    whole = tensors_of(base, list(graft.indices), "base")
    for name, at in graft.indices.items():
        values = graft.values[name]
        width = values.element_size()
        after = whole[name].detach().cpu().flatten().clone()
        after[at.long()] = values
        places = at.long()[:, None] * width + torch.arange(width)
        if len(places) and int(places[-1, -1]) >= 2**32:
            raise EngramError(f"graft: expected positions within 4 GiB, which slime numbers, got {name!r}")
        parts = [torch.tensor([places.numel()]).to(torch.uint32), places.flatten().to(torch.uint32), values]
        delta = b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in parts)
        packed = zstandard.ZstdCompressor(level=1).compress(delta)
        tensors[name] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        checksums[name] = _adler32(after)
    file = "model-00001.safetensors"
    with new_directory(directory) as folder:
        save_tensors(folder / file, tensors, checksums)
        metadata = {
            "version": f"{version:06d}",
            "base_version": f"{before:06d}",
            "delta_encoding": "overwrite",
            "compression_format": "zstd",
            "checksum_format": "adler32",
        }
        index = {"metadata": metadata, "weight_map": dict.fromkeys(tensors, file)}
        write_json(folder / "model.safetensors.index.json", index)


def read_slime(directory: str | os.PathLike, base: Base) -> Graft:
    """Read one of slime's disk deltas, `overwrite`, as a graft of a base, and compare its checksums.

    Args:
        directory: the delta, such as `weight_v000001`.
        base: the tensors before.

    Returns:
        The graft, which is applied to that base.

    Raises:
        EngramError: zstandard is missing, the folder is none or uses what is not read here (xor, checksums
            other than adler32), or what it makes of the base is not what its checksums say.
    """
    from safetensors import SafetensorError, safe_open

    folder, zstandard = Path(directory), _zstandard()
    try:
        metadata = json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]
        used = (metadata["delta_encoding"], metadata["compression_format"], metadata["checksum_format"])
        if used != ("overwrite", "zstd", "adler32"):
            raise ValueError(f"it uses {', '.join(used)}")
        entries = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                checksums = file.metadata() or {}
                for name in file.keys():
                    (weight,) = tensors_of(base, [name], "base").values()
                    delta = _unpacked(zstandard, file.get_tensor(name), 4 + 5 * weight.nbytes)
                    entries[name] = _overwritten(weight, delta, checksums[name])
    except (
        OSError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        SafetensorError,
        zstandard.ZstdError,
    ) as error:
        if isinstance(error, EngramError):
            raise
        raise EngramError(
            f"directory: expected a disk delta of slime, got {str(directory)!r} ({error})"
        ) from error
    return _of_entries(base, entries, "directory")


def _unpacked(zstandard, packed: Tensor, most: int) -> bytes:
    """The bytes of a compressed delta, of which there are no more than if it overwrites everything."""
    content = packed.numpy().tobytes()
    if zstandard.frame_content_size(content) > most:
        raise ValueError("it unpacks to more than the tensor has")
    return zstandard.ZstdDecompressor().decompress(content, max_output_size=most)


def _overwritten(weight: Tensor, delta: bytes, checksum: str) -> tuple[Tensor, Tensor]:
    """The entries of which a delta overwrites a byte, with their values then."""
    count = int.from_bytes(delta[:4], "little")
    if len(delta) != 4 + 5 * count:
        raise ValueError("it is cut off")
    data = torch.frombuffer(bytearray(delta), dtype=torch.uint8)
    places = data[4 : 4 + 4 * count].clone().view(torch.uint32).long()
    after = weight.detach().cpu().contiguous().flatten().clone()
    raw = after.view(torch.uint8)
    if count and int(places.max()) >= len(raw):
        raise ValueError("a position lies beyond the tensor")
    raw[places] = data[4 + 4 * count :]
    if _adler32(after) != checksum:
        raise ValueError("a tensor becomes another one than its checksum says")
    at = (places // after.element_size()).unique()
    return at, after[at]


def _adler32(tensor: Tensor) -> str:
    return f"{zlib.adler32(tensor.contiguous().view(torch.uint8).numpy()):08x}"


def _zstandard():
    try:
        import zstandard
    except ImportError as error:
        raise EngramError("zstandard is needed for slime's deltas: pip install zstandard") from error
    return zstandard


# -- SHiRA ---------------------------------------------------------------------------------------------------


def save_shira(graft: Graft, model: nn.Module, directory: str | os.PathLike) -> None:
    """Write a graft as a SHiRA adapter, which PEFT loads: a sparse matrix that is added to each weight.

    SHiRA gives every matrix `r (in + out)` entries with one r: unused ones are added, and are 0. What is
    added is `value − base`, so that the sum is the value but for its last bit.

    Args:
        graft: of weights of `nn.Linear` alone.
        model: its base.
        directory: a new or empty one.

    Raises:
        EngramError: a parameter is none of those, or has fewer entries than SHiRA wants to set.

    Source: Bhardwaj et al. 2024 (arXiv 2406.13175).
    """
    weights = tensors_of(model, list(graft.indices), "model")
    modules = {name: name.rpartition(".") for name in graft.indices}
    for name, (module, _, kind) in modules.items():
        if kind != "weight" or not isinstance(model.get_submodule(module), nn.Linear):
            raise EngramError(f"graft: expected weights of nn.Linear, which SHiRA adapts, got {name!r}")
    rank = max(-(-len(at) // sum(graft.shapes[name])) for name, at in graft.indices.items())
    tensors: dict[str, Tensor] = {}
    for name, at in graft.indices.items():
        rows, columns = graft.shapes[name]
        wanted = rank * (rows + columns)
        if wanted > rows * columns:
            raise EngramError(f"graft: expected at least {wanted} entries in {name!r}, got {rows * columns}")
        free = torch.ones(rows * columns, dtype=torch.bool)
        free[at.long()] = False
        padding = free.nonzero().flatten()[: wanted - len(at)]
        base = weights[name].detach().cpu().flatten()[at.long()]
        change = graft.values[name].float() - base.float()
        places = torch.cat([at.long(), padding])
        prefix = f"base_model.model.{modules[name][0]}"
        tensors[f"{prefix}.shira_weight"] = torch.cat([change, torch.zeros(len(padding))])
        tensors[f"{prefix}.shira_indices"] = torch.stack([places // columns, places % columns]).int()
    config = {
        "peft_type": "SHIRA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "mask_type": "random",
        "random_seed": None,
        "fan_in_fan_out": False,
        "init_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(module for module, _, _ in modules.values()),
    }
    with new_directory(directory) as folder:
        write_json(folder / "adapter_config.json", config)
        save_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


def _of_entries(base: Base, entries: Mapping[str, tuple[Tensor, Tensor]], argument: str) -> Graft:
    """A graft of positions in any order and values, by name, for a base."""
    weights = tensors_of(base, list(entries), "base")
    indices, values = {}, {}
    for name, (at, value) in entries.items():
        if value.dtype != weights[name].dtype:
            raise EngramError(f"{argument}: expected {weights[name].dtype} in {name!r}, got {value.dtype}")
        order = at.long().cpu().argsort()
        narrow = weights[name].numel() <= 2**31
        indices[name] = at.cpu()[order].to(torch.int32 if narrow else torch.int64)
        values[name] = value.detach().cpu()[order]
    try:
        return Graft.from_entries(weights, indices, values)
    except ValueError as error:
        raise EngramError(f"{argument}: {error}") from error
