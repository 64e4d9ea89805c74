"""`engram memory`: facts that are written in one step, asked for, changed, and forgotten exactly."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import answer as answering
from . import recall
from .common import App, Device, check_folder, reading
from .facts import fact_of, find, read_facts
from .kept import (
    Encoded,
    Folder,
    User,
    counted,
    encoder_name,
    encoder_of,
    filled,
    known_number,
    load,
    number_of,
    saved,
    shown,
)
from .output import emit, note
from .revision import Policy, Revision, revise

if TYPE_CHECKING:
    from ..memory import EpisodicMemory

app = App(
    help="Write facts into an episodic memory, ask it, change them, forget. "
    "How much one recalls: examples/measure_recall.py.",
    no_args_is_help=True,
)


@app.command()
def write(
    memory: Annotated[Path, typer.Argument(help="The memory's folder, or a new one.")],
    facts: Annotated[
        Path,
        typer.Option(help='A fact a line: plain text, or JSON with "value" and perhaps "key", "id", "tags".'),
    ],
    user: User = None,
    tag: Annotated[list[str] | None, typer.Option(help="Of all of these facts; may be repeated.")] = None,
    on_conflict: Annotated[
        Policy,
        typer.Option(help="Where two facts of one key say otherwise: the newest stays, or both, or none."),
    ] = "refuse",
    skip_known: Annotated[
        bool, typer.Option("--skip-known", help="Leave out what is known already.")
    ] = False,
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
    """Write facts into a memory, all of them or none. Long ones take several rows.

    Example: engram memory write capitals --facts capitals.txt
    """
    from ..memory import EpisodicMemory
    from ..memory.storage import is_new

    found = [
        fact._replace(tags=tuple(dict.fromkeys((*fact.tags, *(tag or ()))))) for fact in read_facts(facts)
    ]
    new = is_new(memory)
    if new:
        if not memory.is_dir():
            check_folder("memory", memory)
        strength = _ridge(ridge or "loo")
        sentence_encoder = load(encoder or "minilm", device, light=True)
        named = sentence_encoder.name
        first = EpisodicMemory(
            sentence_encoder.latent if slots is None else slots,
            sentence_encoder.latent,
            ridge=strength,
            seed=seed or 0,
            encoder=named,
            labels=[user],
        )
        wanted = revise(first, 0, found, on_conflict, skip_known)
    else:
        for name, value in (("slots", slots), ("ridge", ridge), ("seed", seed)):
            if value is not None:
                raise ValueError(f"{name}: expected none, as {str(memory)!r} has its own, got {value!r}")
        first = saved(memory)
        wanted = revise(first, known_number(first, user), found, on_conflict, skip_known)
        named = encoder_name(first, memory)
        if encoder is not None and encoder != named:
            raise ValueError(f"encoder: expected {named!r}, which made {str(memory)!r}, got {encoder!r}")
        sentence_encoder = encoder_of(first, memory, device, light=True)
    encoded = Encoded(sentence_encoder, wanted.facts.values())
    with reading("memory"), EpisodicMemory.open(memory, new=(lambda: first) if new else None) as kept:
        if kept.encoder != named:
            raise ValueError(f"encoder: expected {kept.encoder!r}, which made {str(memory)!r}, got {named!r}")
        number = number_of(kept, user, add=True)
        revision = revise(kept, number, found, on_conflict, skip_known)
        kept.forget(ids=revision.replaced)
        encoded.write(kept, number, revision.facts)
    _warn_if_full(kept, number, memory)
    _tell(revision, memory, len(kept.ids))
    emit(
        {
            "written": list(revision.facts),
            "replaced": list(map(str, revision.replaced)),
            "known_lines": revision.known,
            "repeated_lines": revision.repeated,
            "contradictions": [
                {"line": line, "newer": newer, "older": older, "id": None if name is None else str(name)}
                for line, newer, older, name in revision.contradictions
            ],
            "facts": len(kept.ids),
        }
    )


app.command()(recall.ask)
app.command()(answering.chat)


@app.command()
def update(
    memory: Folder,
    fact: Annotated[str, typer.Argument(help="What the fact says now; of one with a key, its new value.")],
    id: Annotated[str | None, typer.Option(help="The fact's id.")] = None,
    text: Annotated[str | None, typer.Option(help="The fact as `list` shows it.")] = None,
    user: User = None,
    device: Device = None,
) -> None:
    """Let a fact say something else, under the same id, key and tags.

    Example: engram memory update capitals --id 3 "The Louvre is in Lyon."
    """
    from ..memory import EpisodicMemory

    if (id is None) == (text is None):
        raise ValueError("id: expected an --id or a --text, got " + ("neither" if id is None else "both"))
    if not fact.strip():
        raise ValueError("fact: expected some text, got none")
    asked = ([] if id is None else [id]), ([] if text is None else [text])
    kept = filled(memory)
    find(kept, *asked, number_of(kept, user))
    sentence_encoder = encoder_of(kept, memory, device, light=True)
    with reading("memory"), EpisodicMemory.open(memory) as kept:
        number = number_of(kept, user)
        (name, *others) = find(kept, *asked, number)
        if others:
            raise ValueError(f"text: expected one that names a single fact, got {text!r}; give its --id")
        older = fact_of(kept.ledger[name])
        newer = older._replace(value=fact)
        kept.forget(ids=[name])
        Encoded(sentence_encoder, [newer]).write(kept, number, {name: newer})
    note(f"Updated {name} of {memory}: {shown(newer.text, False)}")
    emit({"updated": str(name), "older": older.text, "newer": newer.text, "facts": len(kept.ids)})


@app.command()
def forget(
    memory: Folder,
    id: Annotated[list[str] | None, typer.Option(help="A fact's id; may be repeated.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="A fact as `list` shows it; may be repeated.")
    ] = None,
    user: User = None,
) -> None:
    """Forget facts exactly, all that are named or none.

    The memory is as if they had never been written, and so is its file.

    Example: engram memory forget capitals --id 3
    """
    from ..memory import EpisodicMemory

    if not id and not text:
        raise ValueError("id: expected an --id or a --text, got none")
    with reading("memory"), EpisodicMemory.open(memory) as kept:
        names = find(kept, id or [], text or [], number_of(kept, user))
        kept.forget(ids=names)
    note(f"Forgot {counted(len(names))} of {memory}, which holds {len(kept.ids):,}.")
    emit({"forgotten": list(map(str, names)), "facts": len(kept.ids)})


@app.command()
def grow(
    memory: Folder,
    slots: Annotated[int, typer.Option(help="Slots from now on; more than a latent's size add nothing.")],
    seed: Annotated[int, typer.Option(help="Of the new addresses.")] = 0,
) -> None:
    """Give a memory more slots, and write its facts to them anew.

    Example: engram memory grow capitals --slots 384
    """
    from ..memory import EpisodicMemory

    with reading("memory"), EpisodicMemory.open(memory) as kept:
        before = kept.slots
        if not before < slots <= kept.latent:
            raise ValueError(
                f"slots: expected {before + 1} to {kept.latent}, the size of a latent, got {slots}"
            )
        kept.grow(slots, seed=seed)
    note(f"{memory} has {slots:,} slots, and had {before:,}.")
    emit({"slots": slots, "before": before, "facts": len(kept.ids)})


app.command("list")(recall.list_facts)


def _tell(revision: Revision, memory: Path, holds: int) -> None:
    said = [f"Wrote {counted(len(revision.facts))} to {memory}, which holds {holds:,}."]
    for lines, what in ((revision.known, "known already"), (revision.repeated, "said by other lines")):
        if lines:
            said.append(f"{counted(len(lines))} left out: {what}.")
    note(" ".join(said))
    for newer in revision.contradictions:
        older = "an earlier line" if newer.name is None else f"{newer.name}"
        fate = "replaced" if newer.name in revision.replaced or newer.name is None else "contradicts"
        note(
            f"Line {newer.line} {fate} {older}: {shown(newer.newer, False)!r}, not "
            f"{shown(newer.older, False)!r}."
        )


def _warn_if_full(kept: EpisodicMemory, number: int, folder: Path) -> None:
    """Say when a memory has about as many rows as it can tell apart, and what can be done."""
    rows, most = int(kept.count[number]), min(kept.slots, kept.latent)
    if rows <= 0.9 * most:
        return
    way = f"engram memory grow {folder} --slots {kept.latent}"
    if kept.slots >= kept.latent:
        way = "a memory for each --user or subject keeps answers apart"
    warnings.warn(
        f"memory: {rows:,} rows in {most:,} slots: from about that many on, what is read from the memory is "
        f"a mixture, though `ask` still finds facts by their keys; {way}",
        stacklevel=1,
    )


def _ridge(text: str) -> float | str:
    try:
        return text if text == "loo" else float(text)
    except ValueError:
        raise ValueError(f"ridge: expected loo or a number, got {text!r}") from None
