"""A memory as a folder, here or on the Hub, that many may read and one at a time changes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from ..errors import EngramError
from ..hf.hub import HubFolder
from . import files, storage
from .ledger import Ledger

Memory = TypeVar("Memory", bound="MemoryFolder")


class MemoryFolder(HubFolder):
    """`open`, `save_pretrained`, `from_pretrained` and `push_to_hub` of `EpisodicMemory`."""

    # The checksum of each folder as it was read or written: if it has another, somebody changed it.
    _folders: dict[Path, str]

    @classmethod
    @contextmanager
    def open(
        cls: type[Memory], directory: str | os.PathLike, new: Callable[[], Memory] | None = None
    ) -> Iterator[Memory]:
        """Read a folder's memory, let the block change it, and save it when the block ends.

        Until then other processes can read the memory as it was, and cannot change it: they wait. If the
        block raises, the folder stays as it was. When this returns, the change is on the disk, and the file
        that it replaced is overwritten: latents that were forgotten are gone.

        Args:
            directory: a folder with a memory; or, with `new`, a new or empty one.
            new: makes the memory that a new folder gets.

        Raises:
            EngramError: there is no memory, its file is damaged, the folder cannot be written, or another
                process did not end writing within a minute.

        Example:
            >>> with EpisodicMemory.open("facts") as memory:
            ...     memory.forget(ids=["rome"])
        """
        folder = Path(directory)
        with storage.writing(folder):
            if new is not None and storage.is_new(folder):
                folder.mkdir(parents=True, exist_ok=True)
            elif not (folder / storage.FILE).is_file():
                raise files.refused(folder, FileNotFoundError(f"no {storage.FILE}"))
        with storage.locked(folder):
            fresh = new is not None and storage.is_new(folder)
            memory = new() if fresh else cls._read_folder(folder)
            yield memory
            memory._exchange(folder)

    def save_pretrained(self, directory: str | os.PathLike, *, replace: bool = False, **hub_options) -> None:
        """Write the memory with its ledger into a folder, whole or not at all.

        Args:
            directory: a new or empty folder.
            replace: it may also be one that holds a memory, which is replaced.
            **hub_options: what huggingface_hub passes to `save_pretrained`.

        Raises:
            EngramError: the directory exists and holds something else, or cannot be written; or it was
                changed by another since this memory read or wrote it: see `open`.
        """
        folder = Path(directory)
        if not (replace and (folder / storage.FILE).is_file()):
            super().save_pretrained(folder, **hub_options)
            self.adopt(folder)
            return
        with storage.locked(folder):
            there = files.read_checksum(folder)
            if self._folders.get(folder.resolve(), there) != there:
                raise EngramError(
                    f"directory: expected what this memory read or wrote there, got {str(folder)!r}, which "
                    "another changed since; load it again and repeat the change, or save elsewhere"
                )
            self._exchange(folder)

    def _save_pretrained(self, save_directory: Path) -> None:
        self._write(save_directory / storage.FILE)

    def _write(self, path: Path) -> str:
        self._choose_ridges()  # So that nobody who reads the file has to.
        return files.write(path, self.settings, dict(self.named_buffers()), self.ledger)

    def _exchange(self, folder: Path) -> None:
        self._folders[folder.resolve()] = storage.exchange(folder, self._write)
        if not (folder / "README.md").exists():
            self.generate_model_card().save(folder / "README.md")

    @classmethod
    @torch.inference_mode(False)
    def _read_folder(cls: type[Memory], folder: Path) -> Memory:
        saved = files.read(folder)
        try:
            # Of one memory, so that nothing is allocated that is replaced at once.
            memory = cls(**{**saved.settings, "batch": 1, "labels": None}, m0="identity")
            memory.labels = saved.settings["labels"]
            memory._stale = torch.zeros(saved.settings["batch"], dtype=torch.bool, device="cpu")
        except (TypeError, ValueError) as error:
            raise files.refused(folder, error) from error
        for name, tensor in saved.state.items():
            memory.register_buffer(name, tensor)
        memory.ledger = Ledger(saved.entries)
        memory._folders[folder.resolve()] = saved.checksum
        return memory

    def adopt(self, folder: Path) -> None:
        """Take what a folder holds for this memory's own."""
        self._folders[folder.resolve()] = files.read_checksum(folder)
