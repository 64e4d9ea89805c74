"""`engram memory`: facts that are written in one step, asked for, and forgotten exactly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from . import answer as answering
from .common import App, Device, bars, check_folder, console, device_of, reading
from .facts import find, names_of, read_facts

if TYPE_CHECKING:
    from ..memory import EpisodicMemory, SentenceEncoder

app = App(
    help="Write facts into an episodic memory, ask it, forget. "
    "How much one recalls: examples/measure_recall.py.",
    no_args_is_help=True,
)

Folder = Annotated[Path, typer.Argument(help="The memory's folder.")]


@app.command()
def write(
    memory: Annotated[Path, typer.Argument(help="The memory's folder, or a new one.")],
    facts: Annotated[
        Path,
        typer.Option(help='A fact a line: plain text, or JSON with "value" and perhaps "key" and "id".'),
    ],
    encoder: Annotated[
        str | None,
        typer.Option(help="minilm, a folder, or a Hub name; default: the memory's own, or minilm."),
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help="Slots of a new memory; default: the size of a latent.")
    ] = None,
    ridge: Annotated[
        str | None, typer.Option(help="Of a new memory: loo (leave-one-out, the default), or a number.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of a new memory's addresses; default: 0.")] = None,
    device: Device = None,
) -> None:
    """Write facts into a memory, all of them or none.

    Example: engram memory write capitals --facts capitals.txt
    """
    import torch

    from ..memory import EpisodicMemory

    new = not memory.exists() or (memory.is_dir() and not any(memory.iterdir()))
    found = read_facts(facts)
    if new:
        check_folder("memory", memory)
        strength = _ridge(ridge or "loo")
        sentence_encoder = _encoder(encoder or "minilm", device)
        settings = {"ridge": strength, "seed": seed or 0, "encoder": sentence_encoder.name}
        kept = EpisodicMemory(
            sentence_encoder.latent if slots is None else slots, sentence_encoder.latent, **settings
        )
    else:
        for name, value in (("slots", slots), ("ridge", ridge), ("seed", seed)):
            if value is not None:
                raise ValueError(f"{name}: expected none, as {str(memory)!r} has its own, got {value!r}")
        kept = _saved(memory)
        names_of(found, kept)
        if encoder is not None and encoder != kept.encoder:
            raise ValueError(
                f"encoder: expected {kept.encoder!r}, which made {str(memory)!r}, got {encoder!r}"
            )
        sentence_encoder = _encoder(_named(kept, memory), device)
    names = names_of(found, kept)
    # Once each: the key of a fact without one is its value, to the bit.
    texts = list(dict.fromkeys(text for fact in found for text in (fact.value, fact.asked)))
    with bars() as progress:
        progress("encode", 0, len(texts))
        latents = dict(zip(texts, sentence_encoder.encode(texts).cpu(), strict=True))
        progress("encode", len(texts), len(texts))
    values, keys = (
        torch.stack([latents[getattr(fact, name)] for fact in found]) for name in ("value", "asked")
    )
    kept.write(values, keys=keys, ids=names, texts=[fact.text for fact in found])
    kept.save_pretrained(memory, replace=True)
    console.print(f"Wrote {_facts(len(found))} to {memory}, which holds {len(kept):,}.", markup=False)


@app.command()
def ask(
    memory: Folder,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    top: Annotated[int, typer.Option(help="How many facts to show.")] = 5,
    answer: Annotated[
        bool, typer.Option("--answer", help="Let a language model answer in a sentence.")
    ] = False,
    model: answering.Decoder = "smollm2",
    only_memory: answering.OnlyMemory = False,
    device: Device = None,
) -> None:
    """Show the facts that are nearest to what a memory answers.

    Example: engram memory ask capitals "Where is the Eiffel Tower?"
    """
    import torch
    from torch.nn.functional import normalize

    if top < 1:
        raise ValueError(f"top: expected at least 1, got {top}")
    if not question.strip():
        raise ValueError("question: expected some text, got none")
    kept = _filled(memory)
    encoder = _encoder(_named(kept, memory), device)
    if answer:
        answering.show(answering.answerer(kept, encoder, model, only_memory, device)(question))
    latent = encoder.encode([question]).cpu()
    readout = kept.read(latent.double(), addressing="key")
    entries = dict(kept.ledger.items())
    values, keys = (
        torch.cat([getattr(entry, name) for entry in entries.values()]) for name in ("value", "key")
    )
    cosines = normalize(values.double(), dim=-1) @ normalize(readout[0], dim=-1)
    leverages = kept.leverage(keys).tolist()
    table = Table(title=escape(question), box=box.SIMPLE_HEAD)
    for name in ("id", "fact"):
        table.add_column(name, overflow="fold")
    for name in ("cosine", "leverage"):
        table.add_column(name, justify="right")
    names = list(entries)
    for at in cosines.argsort(descending=True, stable=True)[:top].tolist():
        text = entries[names[at]].text or ""
        table.add_row(escape(str(names[at])), escape(text), f"{cosines[at]:.3f}", f"{leverages[at]:.3f}")
    console.print(table)


app.command()(answering.chat)


@app.command()
def forget(
    memory: Folder,
    id: Annotated[list[str] | None, typer.Option(help="A fact's id; may be repeated.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="A fact as `list` shows it; may be repeated.")
    ] = None,
) -> None:
    """Forget facts exactly, all that are named or none.

    The memory is as if they had never been written.

    Example: engram memory forget capitals --id 3
    """
    if not id and not text:
        raise ValueError("id: expected an --id or a --text, got none")
    kept = _filled(memory)
    names = find(kept, id or [], text or [])
    kept.forget(ids=names)
    kept.save_pretrained(memory, replace=True)
    console.print(f"Forgot {_facts(len(names))} of {memory}, which holds {len(kept):,}.", markup=False)


@app.command("list")
def list_facts(memory: Folder) -> None:
    """Show what a memory holds, and how much hangs on each fact."""
    import torch

    kept = _saved(memory)
    facts = Table(show_header=False, title=escape(str(memory)))
    facts.add_row("facts", f"{len(kept):,}")
    facts.add_row("slots, latent", f"{kept.slots:,}, {kept.latent:,}")
    facts.add_row("encoder", escape(kept.encoder or "not named"))
    condition = f"{kept.condition():.3g}"
    chosen = ", ".join(f"{ridge:.3g}" for ridge in kept.ridges.tolist())
    facts.add_row("ridge", f"{chosen} (leave-one-out)" if kept.ridge == "loo" else chosen)
    facts.add_row("condition number", condition)
    console.print(facts)
    if not kept.ids:
        return
    table = Table("id", "fact", box=box.SIMPLE_HEAD)
    table.add_column("leverage", justify="right")
    entries = dict(kept.ledger.items())
    leverages = kept.leverage(torch.cat([entry.key for entry in entries.values()])).tolist()
    for (name, entry), leverage in zip(entries.items(), leverages, strict=True):
        table.add_row(escape(str(name)), escape(entry.text or ""), f"{leverage:.3f}")
    console.print(table)


def _saved(folder: Path) -> EpisodicMemory:
    from ..memory import EpisodicMemory

    with reading("memory"):
        return EpisodicMemory.from_pretrained(folder)


def _filled(folder: Path) -> EpisodicMemory:
    kept = _saved(folder)
    if not kept.ids:
        raise ValueError(f"memory: expected one that holds facts, got {str(folder)!r}, which holds none")
    return kept


def _named(kept: EpisodicMemory, folder: Path) -> str:
    if kept.encoder is None:
        raise ValueError(f"memory: expected one that names its encoder, got {str(folder)!r}")
    return kept.encoder


def _encoder(name: str, device: str | None) -> SentenceEncoder:
    from ..memory import load_encoder

    with reading("encoder"):
        return load_encoder(name, device=device_of(device))


def _facts(count: int) -> str:
    return "1 fact" if count == 1 else f"{count:,} facts"


def _ridge(text: str) -> float | str:
    try:
        return text if text == "loo" else float(text)
    except ValueError:
        raise ValueError(f"ridge: expected loo or a number, got {text!r}") from None
