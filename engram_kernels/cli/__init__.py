"""The command line: `engram doctor`, `edit`, `apply`, `eval`, `graft`, `memory`, `store`, `trace`."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from . import apply, doctor, edit, evaluate, graft, memory, store, trace
from .common import App, launched_ranks
from .output import console, errors

# As docs/command-line.md says it. The mark keeps the lines as they are.
EXIT_STATUS = """Every command takes --json and --quiet. It ends with the status

\b
  0    done
  1    an error: one sentence on the error stream
  2    an unknown option or command, or one that is missing
  3    done, but not as --strict wants it, or ended by --stop-on
  130  interrupted
"""

app = App(
    help="Find, rewrite and transplant the engrams of language models.",
    epilog=EXIT_STATUS,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # a table of options cuts their names in a terminal of 80 columns
)
app.command()(doctor.doctor)
app.command()(edit.edit)
app.command()(apply.apply)
app.command("eval")(evaluate.evaluate)
app.add_typer(graft.app, name="graft")
app.add_typer(memory.app, name="memory")
app.add_typer(store.app, name="store")
app.command()(trace.trace)

PACKAGE = Path(__file__).parents[1]


def show_version(asked: bool) -> None:
    if asked:
        console.print(f"engram_kernels {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    pass


@contextmanager
def own_warnings_alone() -> Iterator[None]:
    """Show this package's warnings as sentences, and hide those of other libraries.

    Those are addressed to the maintainers of this package, who see them in the tests.
    """

    def show(message, category, filename, *_) -> None:
        if category is UserWarning and Path(filename).is_relative_to(PACKAGE):
            errors.print(f"[yellow]Warning:[/yellow] {message}", highlight=False, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def main() -> None:
    """Run the command line; an expected error is one sentence and an exit status that `--help` lists.

    Under torchrun (`torchrun --nproc-per-node 8 -m engram_kernels.cli eval …`) the ranks share the work of
    `edit`, `eval` and `graft localize`.
    """
    with own_warnings_alone(), launched_ranks():
        app()
