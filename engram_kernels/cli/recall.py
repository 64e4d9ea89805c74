"""`engram memory ask` and `list`: what a memory knows of a question, and all that it knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from . import answer as answering
from .common import Device
from .facts import fact_of
from .kept import Folder, User, encoder_of, filled, number_of, saved, shown
from .output import emit, facts, show, table, wanted

if TYPE_CHECKING:
    from ..memory import EpisodicMemory, Recalled
    from ..memory.ledger import Entry, Id

Tags = Annotated[list[str] | None, typer.Option("--tag", help="Only facts with this tag; may be repeated.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Whole texts, leverages, times.")]


def ask(
    memory: Folder,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    top: Annotated[int, typer.Option(help="How many facts to show.")] = 5,
    answer: Annotated[
        bool, typer.Option("--answer", help="Let a language model answer in a sentence.")
    ] = False,
    model: answering.Decoder = "smollm2",
    only_memory: answering.OnlyMemory = False,
    user: User = None,
    tag: Tags = None,
    device: Device = None,
    verbose: Verbose = False,
) -> None:
    """Show the facts that a question is about, if it is about any.

    Example: engram memory ask capitals "Where is the Eiffel Tower?"
    """
    if top < 1:
        raise ValueError(f"top: expected at least 1, got {top}")
    if not question.strip():
        raise ValueError("question: expected some text, got none")
    kept = filled(memory)
    number = number_of(kept, user)
    encoder = encoder_of(kept, memory, device, light=not answer)
    said = None
    if answer:
        where = _with_tags(tag)
        said = answering.answerer(kept, encoder, model, only_memory, device, number, where)(question)
    latent = encoder.encode([question]).cpu()
    threshold = kept.threshold(memory=number)
    (found,) = kept.recall(latent, top, memory=number, where=_with_tags(tag))
    leverages = _leverages(kept, [fact.entry for fact in found]) if verbose else None
    if wanted.json:
        listed = [
            {**_described(fact.name, fact.entry), "score": fact.score, "known": fact.known} for fact in found
        ]
        for one, leverage in zip(listed, leverages or (), strict=False):
            one["leverage"] = leverage
        known = any(fact.known for fact in found)
        told = {} if said is None else {"answer": said.text, "source": said.source}
        emit({"question": question, **told, "threshold": threshold, "known": known, "facts": listed})
        return
    if said is not None:
        answering.tell(said)
    numbers = ("score", "leverage", "written") if verbose else ("score",)
    nearest = table("", "id", "fact", *numbers, numbers=numbers, title=question)
    for i, fact in enumerate(found):
        text = shown(fact.entry.text, verbose) + _contradicted(fact, found[:i])
        more = (f"{leverages[i]:.3f}", _written(fact.entry)) if leverages else ()
        mark = "✓" if fact.known else ""
        nearest.add_row(mark, escape(str(fact.name)), escape(text), f"{fact.score:.3f}", *more)
    show(nearest)
    if any(fact.known for fact in found):
        verdict = f"✓ from {threshold:.3f} on: the question is about the fact."
    elif found:
        verdict = (
            f"No fact is about this: the nearest scores {found[0].score:.3f}, less than {threshold:.3f}."
        )
    else:
        verdict = "There is no such fact."
    show(verdict)


def list_facts(memory: Folder, user: User = None, tag: Tags = None, verbose: Verbose = False) -> None:
    """Show what a memory holds.

    With --verbose also when each fact was written, and how much hangs on it.
    """
    kept = saved(memory)
    has_tags = _with_tags(tag)
    number = None if user is None else number_of(kept, user)
    entries = {
        name: entry
        for name, entry in kept.ledger.items()
        if (number is None or entry.memory == number) and (has_tags is None or has_tags(name, entry))
    }
    leverages = dict(zip(entries, _leverages(kept, list(entries.values())), strict=True)) if verbose else {}
    users = [label for label in kept.labels if label is not None]
    if wanted.json:
        listed = [_described(name, entry, kept.labels) for name, entry in entries.items()]
        for one, leverage in zip(listed, leverages.values(), strict=False):
            one["leverage"] = leverage
        sizes = {"slots": kept.slots, "latent": kept.latent, "encoder": kept.encoder}
        emit({**sizes, "ridges": kept.ridges.tolist(), "users": users, "facts": listed})
        return
    chosen = ", ".join(f"{ridge:.3g}" for ridge in kept.ridges.tolist())
    about = [
        ("facts", f"{len(kept.ids):,}"),
        *([("users", ", ".join(users))] if users else []),
        ("slots, latent", f"{kept.slots:,}, {kept.latent:,}"),
        ("encoder", kept.encoder or "not named"),
        ("ridge", f"{chosen} (leave-one-out)" if kept.ridge == "loo" else chosen),
        *([("condition number", f"{kept.condition():.3g}")] if verbose else []),
    ]
    show(facts(*about, title=str(memory)))
    if not entries:
        return
    tagged = any(fact_of(entry).tags for entry in entries.values())
    columns = ["id", *(["user"] if users else []), "fact", *(["tags"] if tagged else [])]
    numbers = ("leverage", "written") if verbose else ()
    held = table(*columns, *numbers, numbers=numbers)
    for name, entry in entries.items():
        cells = {
            "id": str(name),
            "user": kept.labels[entry.memory] or "",
            "fact": shown(entry.text, verbose),
            "tags": ", ".join(fact_of(entry).tags),
        }
        more = (f"{leverages[name]:.3f}", _written(entry)) if verbose else ()
        held.add_row(*(escape(cells[column]) for column in columns), *more)
    show(held)


def _with_tags(tags: list[str] | None):
    """Which facts have all of the tags; None: all facts."""
    if not tags:
        return None
    return lambda _, entry: set(tags) <= set(fact_of(entry).tags)


def _leverages(kept: EpisodicMemory, entries: Sequence[Entry]) -> list[float]:
    """The largest leverage of each fact's rows."""
    import torch

    found = [0.0] * len(entries)
    for number in {entry.memory for entry in entries}:
        mine = [i for i, entry in enumerate(entries) if entry.memory == number]
        parts = [len(entries[i].key) for i in mine]
        leverages = kept.leverage(torch.cat([entries[i].key for i in mine]), memory=number)
        for i, rows in zip(mine, leverages.split(parts), strict=True):
            found[i] = float(rows.max())
    return found


def _described(name: Id, entry: Entry, labels: Sequence[str | None] | None = None) -> dict[str, Any]:
    """A fact for JSON."""
    fact = fact_of(entry)
    described: dict[str, Any] = {"id": str(name), "text": entry.text, "key": fact.key, "value": fact.value}
    described |= {"tags": list(fact.tags), "written": _written(entry) or None, "rows": len(entry.value)}
    return described if labels is None else {**described, "user": labels[entry.memory]}


def _written(entry: Entry) -> str:
    written = (entry.metadata or {}).get("written")
    return written if isinstance(written, str) else ""


def _contradicted(fact: Recalled, nearer: Sequence[Recalled]) -> str:
    """A note on a fact that a newer one of the same key, which stands before it, contradicts."""
    mine = fact_of(fact.entry)
    for other in nearer:
        if mine.key is not None and fact_of(other.entry).topic == mine.topic:
            return f" (older than {other.name}, which says otherwise)"
    return ""
