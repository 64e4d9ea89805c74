"""What a command prints: tables and sentences for people, or with --json one document for programs."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

console, errors = Console(), Console(stderr=True)


@dataclass
class Wanted:
    """What the command that runs was asked for."""

    json: bool = False
    quiet: bool = False


wanted = Wanted()

OPTIONS = {
    "as_json": Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")],
    "quiet": Annotated[bool, typer.Option("--quiet", help="Print the result only: no progress, no notes.")],
}


def with_output_options(command: Callable) -> Callable:
    """The command with the options `--json` and `--quiet`, which hold for all that it prints."""
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(*, as_json: bool, quiet: bool, **given: Any) -> Any:
        with _asked_for(as_json, quiet):
            return command(**given)

    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in OPTIONS.items()
    ]
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *more])  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
    return run


@contextmanager
def _asked_for(as_json: bool, quiet: bool) -> Iterator[None]:
    wanted.json, wanted.quiet = as_json, quiet
    try:
        yield
    finally:
        wanted.json = wanted.quiet = False


def note(text: str) -> None:
    """Print a sentence beside the result: what was saved, where, how many."""
    if not (wanted.json or wanted.quiet):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def show(shown: RenderableType, wrap: bool = True) -> None:
    """Print a part of the result, as a person reads it."""
    if not wanted.json:
        console.print(shown, highlight=False, soft_wrap=not wrap)


def emit(content: object, indent: int | None = 2) -> None:
    """Print the result as a program reads it: a command's one document, or one a line."""
    if wanted.json and not console.quiet:
        typer.echo(json.dumps(content, indent=indent, ensure_ascii=False, default=str))


def table(
    *columns: str, numbers: Collection[str] = (), title: str | None = None, caption: str | None = None
) -> Table:
    """A table for a terminal of 80 columns: texts are folded, the columns named in `numbers` never are."""
    made = Table(title=title and escape(title), caption=caption and escape(caption), box=box.SIMPLE_HEAD)
    for name in columns:
        if name in numbers:
            made.add_column(name, justify="right", no_wrap=True, min_width=len(name))
        else:
            made.add_column(name, overflow="fold")
    return made


def facts(*rows: tuple[str, str], title: str | None = None) -> Table:
    """A table of names and what they are."""
    made = Table(show_header=False, title=title and escape(title), box=box.SIMPLE)
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(escape(name), escape(value))
    return made


MARKS = {True: "[green]✓[/green]", False: "[red]✗[/red]"}
