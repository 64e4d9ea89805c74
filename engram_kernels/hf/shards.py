"""A checkpoint's safetensors files, changed tensor by tensor: the model is never in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .._hashing import checksum_of, tensor_bytes
from .._io import read_json, write_directory
from ..errors import EngramError
from .loading import DEMO_MODEL, SEAL, converted_directory, demo_model_directory, gguf_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Of other libraries' weights, which would stay as they were, and of what is no part of a model.
LEFT_OUT = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".ot",
    ".lock",
)
HUB_FILES = ["model*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py"]
PIECE = 1 << 20

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class OtherLayoutError(EngramError):
    """The files hold other tensors than the model that is loaded from them: only loading it tells which."""


class Entry(NamedTuple):
    """Where a tensor lies: in bytes `start` to `stop` of a file, row-major."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint:
    """The tensors of a folder's `model.safetensors`, or of the shards that its index names.

    Args:
        folder: of a model of transformers.

    Attributes:
        entries: by name, where each tensor lies.

    Raises:
        OtherLayoutError: it has no such files, they are quantised, or an adapter lies beside them.

    Example:
        >>> checkpoint = Checkpoint(checkpoint_folder("Qwen/Qwen3-0.6B"))
        >>> checkpoint.rewrite("edited", {"model.layers.6.mlp.down_proj.weight": torch.Tensor.neg_})
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        try:
            config = read_json(self.folder / "config.json")
            if listed := index_of(self.folder):
                index = read_json(listed)["weight_map"]
                for file in index.values():
                    # Rewritten files have the same names, and must lie in their new folder.
                    if Path(str(file)).name != file:
                        raise ValueError(f"{INDEX} names {file!r}, which is not in its folder")
                self.files = sorted(set(index.values()))
            else:
                index, self.files = None, [SINGLE]
            self.entries = {name: entry for file in self.files for name, entry in _header(self.folder, file)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OtherLayoutError(
                f"model: expected a folder with safetensors files, got {str(folder)!r} ({error})"
            ) from error
        missing = [name for name in index or () if name not in self.entries]
        if missing:
            raise OtherLayoutError(f"model: expected {missing[0]!r} in {index[missing[0]]}, got none")
        if (self.folder / "adapter_config.json").exists():
            raise OtherLayoutError("model: expected one without an adapter, got a folder with one")
        if config.get("quantization_config"):
            raise OtherLayoutError("model: expected plain weights, got a quantised checkpoint")

    def expect(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        """Make sure that some tensors are there, and that loading the files in a type leaves all as they are.

        Raises:
            OtherLayoutError: they have not.
            EngramError: a tensor has another shape.
        """
        others = {entry.dtype for entry in self.entries.values()} - {
            name for name, kind in DTYPES.items() if kind == dtype
        }
        if others:
            raise OtherLayoutError(f"model: expected tensors of {dtype}, got {', '.join(sorted(others))}")
        for name, shape in shapes.items():
            if name not in self.entries:
                raise OtherLayoutError(f"model: expected a tensor {name!r}, got none of that name")
            if self.entries[name].shape != tuple(shape):
                raise EngramError(
                    f"model: expected shape {list(shape)} in {name!r}, got {list(self.entries[name].shape)}"
                )

    def checksums(self, names: Collection[str]) -> dict[str, str]:
        """The checksums of some tensors, as of those in memory; a megabyte of each is read at a time."""
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return dict(zip(names, pool.map(self._checksum, names), strict=True))

    def rewrite(
        self,
        directory: str | os.PathLike,
        changes: Mapping[str, Callable[[Tensor], object]],
        link: bool = False,
    ) -> None:
        """Write the checkpoint with some tensors changed: the same files, tensors and order, all or nothing.

        Weights in other formats are left out. One of the ranks of a run writes.

        Args:
            directory: a new or empty one.
            changes: by name, what changes a tensor in place; it is given a copy in main memory.
            link: make files whose tensors all stay hard links to the checkpoint's own, instead of copies.
                They are the same bytes on the disk: writing into one writes into the other.

        Raises:
            EngramError: the directory is not empty or cannot be written, or files cannot be linked there.
        """

        def write(folder: Path) -> None:
            for source in _others(self.folder):
                target = folder / source.relative_to(self.folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, target)
            for file in self.files:
                names = [name for name in changes if self.entries[name].file == file]
                source, target = (self.folder / file).resolve(), folder / file
                if link and not names:
                    _link(source, target)
                    continue
                shutil.copyfile(source, target)
                with open(target, "r+b") as opened:
                    for name in names:
                        tensor = self.read(name)
                        changes[name](tensor)
                        opened.seek(self.entries[name].start)
                        opened.write(tensor_bytes(tensor))

        write_directory(directory, write)

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="cpu")
        with open(self.folder / entry.file, "rb") as file:
            file.seek(entry.start)
            if file.readinto(tensor_bytes(tensor)) != entry.stop - entry.start:
                raise EngramError(f"model: expected {name!r} whole, got {entry.file} cut off")
        return tensor

    def _checksum(self, name: str) -> str:
        entry = self.entries[name]
        return checksum_of(DTYPES[entry.dtype], entry.shape, _pieces(self.folder / entry.file, entry))

    def __repr__(self) -> str:
        return f"Checkpoint({len(self.entries):,} tensors in {len(self.files)} files of {str(self.folder)!r})"


def checkpoint_folder(name_or_directory: str | os.PathLike) -> Path:
    """The folder of a model: itself, what a GGUF file is converted to, or the snapshot of one on the Hub.

    Raises:
        OtherLayoutError: there is none with safetensors files.
    """
    if str(name_or_directory) == DEMO_MODEL:
        return demo_model_directory()
    if gguf := gguf_file(Path(name_or_directory)):
        return converted_directory(gguf)
    if Path(name_or_directory).is_dir():
        return Path(name_or_directory)
    import huggingface_hub

    try:
        name = str(name_or_directory)
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    # A name that is none, no network, no such repository.
    except (OSError, ValueError) as error:
        raise OtherLayoutError(f"model: expected a folder or a name on the Hub, got {name!r}") from error


def _header(folder: Path, file: str) -> Iterator[tuple[str, Entry]]:
    """The tensors of a safetensors file: eight bytes of length, a header in JSON, and the tensors' bytes."""
    with open(folder / file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        size = os.fstat(opened.fileno()).st_size
        if not 0 < length <= size - 8:
            raise ValueError(f"{file} is no safetensors file")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        if stop > size:
            raise ValueError(f"{file} is cut off")
        yield name, Entry(file, entry["dtype"], tuple(entry["shape"]), start, stop)


def index_of(folder: Path) -> Path | None:
    """The file that says in which files the weights are; as in transformers none beside a single one.

    It may be left of what was there before.
    """
    index = folder / INDEX
    return index if index.is_file() and not (folder / SINGLE).is_file() else None


def _pieces(path: Path, entry: Entry) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(entry.start)
        for begin in range(entry.start, entry.stop, PIECE):
            yield file.read(min(PIECE, entry.stop - begin))


def _others(folder: Path) -> Iterator[Path]:
    """The files beside the weights: configuration, tokenizer, templates, code."""
    for path in (*sorted(folder.iterdir()), *sorted(folder.glob("additional_chat_templates/*"))):
        ours = path.name == SEAL or path.name.endswith(".index.json")
        if path.is_file() and path.suffix not in LEFT_OUT and not ours:
            yield path
    if index := index_of(folder):
        yield index


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        raise EngramError(
            f"link: expected the model and the new directory on one file system that has hard links, "
            f"got {error.strerror}: copy instead"
        ) from error
