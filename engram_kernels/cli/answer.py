"""`engram memory chat`, and what `engram memory ask --answer` shows: sentences from a memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from .common import Device, device_of, reading
from .kept import Folder, User, encoder_of, number_of, saved
from .output import console, emit, show, wanted

if TYPE_CHECKING:
    from ..larimar import Answer, Answerer
    from ..memory import EpisodicMemory, SentenceEncoder
    from ..memory.ledger import Entry, Id

Decoder = Annotated[str, typer.Option(help="Who answers: smollm2, a folder, or a Hub name of a chat model.")]
OnlyMemory = Annotated[
    bool, typer.Option("--only-memory", help="Let the model say nothing that the memory does not tell.")
]

# Facts beside an answer are cut to this length.
_WIDTH = 120


def chat(
    memory: Folder,
    model: Decoder = "smollm2",
    only_memory: OnlyMemory = False,
    user: User = None,
    device: Device = None,
) -> None:
    """Answer questions from a memory, a line each, until an empty line.

    Below an answer stands the fact that it rests on. The folder is read anew for each question, so that what
    is written or forgotten meanwhile counts. With --json an answer is an object on one line.

    Example: engram memory chat town
    """
    kept = saved(memory)
    encoder = encoder_of(kept, memory, device)
    speaker = answerer(kept, encoder, model, only_memory, device, number_of(kept, user))
    while question := _asked():
        speaker.memory = saved(memory)
        answer = speaker(question)
        tell(answer)
        emit({"question": question, **described(answer)}, indent=None)


def answerer(
    memory: EpisodicMemory,
    encoder: SentenceEncoder,
    model: str,
    only_memory: bool,
    device: str | None,
    number: int = 0,
    where: Callable[[Id, Entry], bool] | None = None,
) -> Answerer:
    """What answers from a memory, with its language model loaded."""
    from ..hf.loading import load_model
    from ..larimar import Answerer

    with reading("model"):
        decoder, tokenizer = load_model(model, device=device_of(device))
    return Answerer(memory, encoder, decoder, tokenizer, not only_memory, number, where)


def described(answer: Answer) -> dict[str, object]:
    """An answer for JSON, with the fact that it rests on."""
    facts = [
        {"id": str(best.recalled.name), "score": best.score, "passage": best.passage}
        for best in answer.facts[:1]
    ]
    return {"answer": answer.text, "source": answer.source, "facts": facts}


def tell(answer: Answer) -> None:
    """Print an answer, and below it what it rests on."""
    show(f"[bold]{escape(answer.text)}[/bold]")
    if answer.source == "model":
        show("[dim]  the model by itself: the memory has nothing near to this[/dim]")
        return
    kind = {"memory": "from", "quote": "quoted from", "nothing": "nearest:"}[answer.source]
    for best in answer.facts[:1]:
        line = f"  {kind} {best.recalled.name}, {best.score:.2f}: {_shortened(best.passage)}"
        show(f"[dim]{escape(line)}[/dim]")


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…"


def _asked() -> str:
    """The next question; empty at the end of what is typed or piped."""
    try:
        question = console.input("" if wanted.json else "[bold cyan]? [/bold cyan]").strip()
    except (EOFError, KeyboardInterrupt):
        if not wanted.json:
            console.print()
        return ""
    if not sys.stdin.isatty() and not wanted.json:
        console.print(question, markup=False, highlight=False)
    return question
