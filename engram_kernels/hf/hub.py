"""Objects that are saved as a folder and shared on the Hub."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import TypeVar

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin

from .._io import let_all_read, write_directory
from ..errors import EngramError

Kept = TypeVar("Kept", bound="HubFolder")


class HubFolder(ModelHubMixin, library_name="engram_kernels"):
    """Something with `save_pretrained`, `from_pretrained` and `push_to_hub`.

    A subclass writes and reads a folder; that it is written whole or not at all, that a name may be one on
    the Hub, the model card and the upload come from here and from huggingface_hub's mixin.
    """

    def __new__(cls, *_arguments, **_keywords):
        # The mixin's own would keep the arguments, which are tensors, as a configuration.
        return super(ModelHubMixin, cls).__new__(cls)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write into an empty folder."""
        raise NotImplementedError

    @classmethod
    def _read_folder(cls: type[Kept], folder: Path, **options) -> Kept:
        """Read a folder that `_save_pretrained` wrote.

        Raises:
            EngramError: it is none, or was changed since.
        """
        raise NotImplementedError

    def save_pretrained(
        self, directory: str | os.PathLike, *, config: None = None, model_card_kwargs: None = None
    ) -> None:
        """Write a new folder: all of it or nothing. Of the ranks of a run that name it, one writes it.

        Args:
            directory: a new or empty one.
            config, model_card_kwargs: None; `push_to_hub` passes them.

        Raises:
            EngramError: the directory is not empty or cannot be written.

        Example:
            >>> kept.save_pretrained("kept")
        """
        write_directory(directory, self._fill)

    def _fill(self, folder: Path) -> None:
        self._save_pretrained(folder)
        if not (folder / "README.md").exists():
            self.generate_model_card().save(folder / "README.md")
        let_all_read(folder)

    @classmethod
    def from_pretrained(
        cls: type[Kept],
        name_or_directory: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        **options,
    ) -> Kept:
        """Read a folder, here or on the Hub.

        Args:
            name_or_directory: a folder that `save_pretrained` wrote, or the name of a repository on the Hub.
            revision: a branch, a tag or a commit on the Hub.
            token: for a private repository; None takes the one that `hf auth login` keeps.
            **options: of the class.

        Raises:
            EngramError: there is no such folder or repository, it holds something else, or was changed.
        """
        directory = Path(name_or_directory)
        if not directory.is_dir():
            directory = _snapshot(str(name_or_directory), revision, token)
        return cls._read_folder(directory, **options)

    def generate_model_card(self, *_arguments, **_keywords) -> ModelCard:
        """The card that a saved folder carries: what it is, and how it is loaded."""
        kind = type(self)
        # Of the package that exports it, where a module below it defines it.
        package = ".".join(kind.__module__.split(".")[:2])
        data = ModelCardData(library_name="engram_kernels", tags=["engram_kernels", kind.__name__])
        purpose = (inspect.getdoc(kind) or kind.__name__).partition("\n")[0]
        return ModelCard(
            f"---\n{data.to_yaml()}\n---\n\n# {kind.__name__}\n\n{purpose}\n\n"
            f"```python\nfrom {package} import {kind.__name__}\n\n"
            f'kept = {kind.__name__}.from_pretrained("a folder or a name on the Hub")\n```\n'
        )


def _snapshot(name: str, revision: str | None, token: str | bool | None) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, token=token))
    # A name that is none, no network, no such repository.
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise EngramError(
            f"name_or_directory: expected a folder or a repository on the Hub, got {name!r} ({reason})"
        ) from error
