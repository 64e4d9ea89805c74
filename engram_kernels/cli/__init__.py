"""The command line: `engram doctor`, `edit`, `eval`, `graft`, `memory` and `trace`."""

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import EngramError
from . import doctor, edit, evaluate, graft, memory, trace

app = typer.Typer(
    help="Find, rewrite and transplant the engrams of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(doctor.doctor)
app.command()(edit.edit)
app.command("eval")(evaluate.evaluate)
app.add_typer(graft.app, name="graft")
app.add_typer(memory.app, name="memory")
app.command()(trace.trace)


def main() -> None:
    """Run the command line; an expected error is one sentence and exit status 1."""
    try:
        app()
    except (EngramError, ValueError, TypeError, OSError) as error:
        Console(stderr=True).print(f"[red]Error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
