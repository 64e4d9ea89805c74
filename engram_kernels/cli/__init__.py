"""The command line: `engram doctor`, `edit`, `apply`, `eval`, `graft`, `memory` and `trace`."""

import warnings
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import EngramError
from . import apply, doctor, edit, evaluate, graft, memory, trace

app = typer.Typer(
    help="Find, rewrite and transplant the engrams of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(doctor.doctor)
app.command()(edit.edit)
app.command()(apply.apply)
app.command("eval")(evaluate.evaluate)
app.add_typer(graft.app, name="graft")
app.add_typer(memory.app, name="memory")
app.command()(trace.trace)


PACKAGE = Path(__file__).parents[1]


def main() -> None:
    """Run the command line; an expected error is one sentence and exit status 1."""
    default = warnings.formatwarning

    def sentence(message, category, filename, *place) -> str:
        """A warning of this package, without the line of code, which is none of the user's."""
        own = Path(filename).is_relative_to(PACKAGE)
        return f"Warning: {message}\n" if own else default(message, category, filename, *place)

    warnings.formatwarning = sentence
    try:
        app()
    except (EngramError, ValueError, TypeError, OSError) as error:
        Console(stderr=True).print(f"[red]Error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
    finally:
        warnings.formatwarning = default
