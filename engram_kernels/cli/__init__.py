"""The command line: `engram doctor`, `engram edit` and `engram graft`."""

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import EngramError
from . import doctor, edit, graft

app = typer.Typer(
    help="Find, rewrite and transplant the engrams of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(doctor.doctor)
app.command()(edit.edit)
app.add_typer(graft.app, name="graft")


def main() -> None:
    """Run the command line; an expected error is one sentence and exit status 1."""
    try:
        app()
    except (EngramError, ValueError, TypeError, OSError) as error:
        Console(stderr=True).print(f"[red]Error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
