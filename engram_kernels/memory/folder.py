"""A memory as a folder, here or on the Hub, which is not replaced if another has changed it since."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from ..errors import EngramError
from ..hf.hub import HubFolder
from . import files
from .ledger import Ledger

Memory = TypeVar("Memory", bound="MemoryFolder")


class MemoryFolder(HubFolder):
    """`save_pretrained`, `from_pretrained` and `push_to_hub` of `EpisodicMemory`."""

    # The checksum of each folder as it was read or written: if it has another, somebody changed it.
    _folders: dict[Path, str]

    def save_pretrained(self, directory: str | os.PathLike, *, replace: bool = False, **hub_options) -> None:
        """Write the memory with its ledger into a folder, whole or not at all.

        Args:
            directory: a new or empty folder.
            replace: it may also be one that holds a memory, which is replaced.
            **hub_options: what huggingface_hub passes to `save_pretrained`.

        Raises:
            EngramError: the directory exists and holds something else, or cannot be written; or it was
                changed by another since this memory read or wrote it.
        """
        folder = Path(directory)
        if replace and (folder / files.CONFIG).is_file():
            self._replace(folder)
        else:
            super().save_pretrained(folder, **hub_options)
        self.adopt(folder)

    def _save_pretrained(self, save_directory: Path) -> None:
        state = dict(self.named_buffers())
        files.write(save_directory, self.settings, state, self.ledger)

    @classmethod
    def _read_folder(cls: type[Memory], folder: Path) -> Memory:
        saved = files.read(folder)
        try:
            memory = cls(**saved.settings, m0="identity")
            unnamed = saved.state["count"].tolist()
            for entry in saved.entries.values():
                unnamed[entry.memory] -= len(entry.value)
            if min(unnamed) < 0:
                raise ValueError("its ledger has other rows than its state")
            for name, buffer in memory.named_buffers():
                there = saved.state[name]
                if there.shape != buffer.shape or there.dtype != buffer.dtype:
                    raise ValueError(f"{name} has another shape or type than its configuration says")
                buffer.copy_(there)
        except (LookupError, TypeError, ValueError) as error:
            raise files.refused(folder, error) from error
        memory.ledger = Ledger(saved.entries)
        memory.adopt(folder)
        return memory

    def _replace(self, folder: Path) -> None:
        """Write in place of the memory that a folder holds.

        Raises:
            EngramError: it was changed since this memory read or wrote it, or cannot be written.
        """
        there = files.read_config(folder)["checksum"]
        if self._folders.get(folder.resolve(), there) != there:
            raise EngramError(
                f"directory: expected what this memory read or wrote there, got {str(folder)!r}, which "
                "another changed since; load it again and repeat the change, or save elsewhere"
            )
        try:
            self._save_pretrained(folder)
        except OSError as error:
            reason = error.strerror or error
            raise EngramError(
                f"directory: expected one that can be written, got {str(folder)!r} ({reason})"
            ) from error

    def adopt(self, folder: Path) -> None:
        """Take what a folder holds for this memory's own."""
        self._folders[folder.resolve()] = files.read_config(folder)["checksum"]
