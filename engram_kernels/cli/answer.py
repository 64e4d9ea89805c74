"""`engram memory chat`, and what `engram memory ask --answer` shows: sentences from a memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from .common import Device, console, device_of, reading

if TYPE_CHECKING:
    from ..larimar import Answer, Answerer
    from ..memory import EpisodicMemory, SentenceEncoder

Decoder = Annotated[str, typer.Option(help="Who answers: smollm2, a folder, or a Hub name of a chat model.")]
OnlyMemory = Annotated[
    bool, typer.Option("--only-memory", help="Let the model say nothing that the memory does not tell.")
]

# Facts beside an answer are cut to this length.
_WIDTH = 120


def chat(
    memory: Annotated[Path, typer.Argument(help="The memory's folder.")],
    model: Decoder = "smollm2",
    only_memory: OnlyMemory = False,
    device: Device = None,
) -> None:
    """Answer questions from a memory, a line each, until an empty line.

    Below an answer stands the fact that it rests on. The folder is read anew for each question, so that what
    is written or forgotten meanwhile counts.

    Example: engram memory chat town
    """
    from ..memory import load_encoder

    kept = _read(memory)
    if kept.encoder is None:
        raise ValueError(f"memory: expected one that names its encoder, got {str(memory)!r}")
    with reading("encoder"):
        encoder = load_encoder(kept.encoder, device=device_of(device))
    speaker = answerer(kept, encoder, model, only_memory, device)
    while question := _asked():
        speaker.memory = _read(memory)
        show(speaker(question))


def answerer(
    memory: EpisodicMemory, encoder: SentenceEncoder, model: str, only_memory: bool, device: str | None
) -> Answerer:
    """What answers from a memory, with its language model loaded."""
    from ..hf.loading import load_model
    from ..larimar import Answerer

    with reading("model"):
        decoder, tokenizer = load_model(model, device=device_of(device))
    return Answerer(memory, encoder, decoder, tokenizer, alone=not only_memory)


def show(answer: Answer) -> None:
    """Print an answer, and below it what it rests on."""
    console.print(f"[bold]{escape(answer.text)}[/bold]", highlight=False)
    if answer.source == "model":
        console.print("[dim]  the model by itself: the memory has nothing near to this[/dim]")
        return
    kind = {"memory": "from", "quote": "quoted from", "nothing": "nearest:"}[answer.source]
    for best in answer.facts[:1]:
        line = f"  {kind} {best.recalled.name}, {best.score:.2f}: {_shortened(best.passage)}"
        console.print(f"[dim]{escape(line)}[/dim]", highlight=False)


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…"


def _read(folder: Path) -> EpisodicMemory:
    from ..memory import EpisodicMemory

    with reading("memory"):
        return EpisodicMemory.from_pretrained(folder)


def _asked() -> str:
    """The next question; empty at the end of what is typed or piped."""
    try:
        question = console.input("[bold cyan]? [/bold cyan]").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return ""
    if not sys.stdin.isatty():
        console.print(question, markup=False, highlight=False)
    return question
