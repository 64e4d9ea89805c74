"""`engram store`: edits in a folder, which later calls add to and take from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .common import (
    App,
    Corpus,
    Device,
    Dtype,
    Layers,
    Model,
    NotAsWantedError,
    Seed,
    StopOn,
    Tokens,
    Values,
    bars,
    bounds_of,
    check_folder,
    layers_of,
    load,
    reading,
)
from .examples import lines
from .output import MARKS, emit, note, show, table

if TYPE_CHECKING:
    from ..editing import Edit, EditStore, Health, StoredEdit

app = App(help="Keep the edits of one model in a folder, for later ones to spare.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The store's folder.")]


@app.command()
def add(
    store: Annotated[Path, typer.Argument(help="The store's folder, or a new one.")],
    subject: Annotated[
        str | None, typer.Option(help="What the fact is about, as it stands in the text.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The text before the answer, with {} for the subject.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="What the model shall say instead.")] = None,
    facts: Annotated[
        Path | None,
        typer.Option(help='Or many: JSON lines with "subject", "prompt", "target", perhaps "paraphrases".'),
    ] = None,
    model: Model = "smollm2",
    method: Annotated[
        str | None,
        typer.Option(
            help="Of a new store: engram, rome, memit and others (docs/methods.md), one edit at a time, each "
            "of which holds the earlier ones; natural and ultraedit in batches."
        ),
    ] = None,
    layers: Layers = None,
    values: Values = None,
    stop_on: StopOn = None,
    corpus: Corpus = None,
    tokens: Tokens = None,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Make edits in the model as edited so far, and keep them.

    Example: engram store add facts --subject "The Eiffel Tower" --prompt "{} is in the city of" --target Rome
    """
    edits = _edits(subject, prompt, target, facts)
    asked = {"method": method, "layers": layers_of(layers), "values": values}
    bounds = bounds_of(stop_on)
    with _bound(store, model, dtype, device, corpus=corpus, tokens=tokens, seed=seed, **asked) as kept:
        made = kept.add(edits, stop_on=bounds)
        count, health = len(kept), kept.health[-1]
        reason = "; ".join(health.past(bounds or {}))
    show(_table(made))
    note(f"{store}: {_counted(count)} of {model}.")
    note(_in_words(health))
    emit(
        {
            "store": store,
            "model": model,
            "added": [_described(one) for one in made],
            "edits": count,
            "health": asdict(health),
        }
    )
    if len(made) < len(edits):
        raise NotAsWantedError(f"stop_on: {_counted(len(edits) - len(made))} not made, {reason}")


@app.command("list")
def list_(store: Folder) -> None:
    """Show the edits of a store.

    Example: engram store list facts
    """
    kept = _opened(store)
    show(_table(kept))
    note(f"{_counted(len(kept))} of layers {', '.join(map(str, kept.layers))}.")
    emit({"store": store, "layers": list(kept.layers), "edits": [_described(one) for one in kept]})


@app.command()
def remove(
    store: Folder,
    id: Annotated[
        list[int], typer.Option(help="The number of an edit, as `list` shows it; may be repeated.")
    ],
    model: Model = "smollm2",
    corpus: Corpus = None,
    tokens: Tokens = None,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Take edits out, as if they had never been made.

    The others are written anew.

    Example: engram store remove facts --id 3
    """
    with _bound(store, model, dtype, device, corpus=corpus, tokens=tokens, seed=seed) as kept:
        for number in id:
            kept.remove(number)
        count = len(kept)
    note(f"{store}: {_counted(count)} of {model}.")
    emit({"store": store, "model": model, "removed": id, "edits": count})


@app.command()
def export(
    store: Folder,
    out: Annotated[Path, typer.Option(help="New folder for the adapter.")],
    rank: Annotated[
        int | None, typer.Option(help="At most this rank a matrix, for serving; default: as it is.", min=1)
    ] = None,
) -> None:
    """Write all edits as one LoRA adapter.

    Example: engram store export facts --out facts-adapter
    """
    check_folder("out", out)
    kept = _opened(store)
    with reading("store", "directory"):
        lost = kept.export(out, rank)
    note(f"Saved {_counted(len(kept))} to {out}.")
    if rank is not None:
        note(f"Of what answers change by, {max(lost.values()):.1%} is lost in the matrix where most is.")
    emit({"store": store, "out": out, "edits": len(kept), "lost": lost})


@app.command()
def verify(
    store: Folder,
    model: Annotated[
        str | None, typer.Option(help="Its base model: then the edited weights are rebuilt and compared.")
    ] = None,
    corpus: Corpus = None,
    tokens: Tokens = None,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Read all of a store, and rebuild its model to the bit.

    Example: engram store verify facts --model smollm2
    """
    if model is None:
        count, what = _opened(store).verify(), "all can be read"
    else:
        with _bound(store, model, dtype, device, corpus=corpus, tokens=tokens, seed=seed) as kept:
            count, what = kept.verify(), f"in {model} the weights are as they were, bit for bit"
    note(f"{store}: {_counted(count)}; {what}.")
    emit({"store": store, "edits": count, "rebuilt": model is not None})


def _in_words(health: Health) -> str:
    """What was measured after the last batch."""
    found = [f"‖W‖ × {health.growth:.3f}", f"σ₁(ΔW)/σ₁(W) {health.update:.3f}"]
    if health.holding is not None:
        found.append(f"earlier edits that hold {health.holding:.2f}")
    if health.perplexity is not None:
        found.append(f"perplexity {health.perplexity:+.1%}")
    return f"Health: {', '.join(found)}."


def _counted(count: int) -> str:
    return f"{count:,} edit" + "s" * (count != 1)


def _opened(store: Path, *model, **options) -> EditStore:
    from ..editing import EditStore

    with reading("store", "directory"):
        return EditStore(store, *model, **options)


@contextmanager
def _bound(store: Path, model: str, dtype: str, device: str | None, **options) -> Iterator[EditStore]:
    """A store with its model, while the progress is shown."""
    with bars() as progress:
        loaded = load(progress, model, dtype, device)
        with _opened(store, *loaded, progress=progress, **options) as kept:
            yield kept


def _edits(subject: str | None, prompt: str | None, target: str | None, facts: Path | None) -> list[Edit]:
    from ..editing import Edit

    one = [subject, prompt, target]
    if facts is None:
        if None in one:
            raise ValueError("facts: expected a file, or a subject, a prompt and a target, got neither")
        return [Edit(*one)]
    if any(part is not None for part in one):
        raise ValueError("facts: expected a file or one fact, got both")
    edits = []
    for number, line in lines("facts", facts):
        try:
            edits.append(Edit(**json.loads(line)))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"facts: expected a fact in line {number}, got {line[:60]!r} ({error})"
            ) from None
    return edits


def _table(stored) -> Table:
    edits = table("id", "fact", "p before", "p after", "took", numbers=("id", "p before", "p after"))
    for one in stored:
        record = one.record
        chances = f"{record.probability_before:.4f}", f"{record.probability_after:.4f}"
        edits.add_row(str(one.id), escape(record.edit.text), *chances, MARKS[record.took])
    return edits


def _described(one: StoredEdit) -> dict[str, object]:
    record = one.record
    chances = {"before": record.probability_before, "after": record.probability_after}
    return {"id": one.id, "text": record.edit.text, "took": record.took, "probability": chances}
