"""`engram trace`: where in a model a fact lies."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .._io import read_json
from ..errors import EngramError
from ..hf.tokens import check_prompt, check_text
from .common import (
    Device,
    Dtype,
    Model,
    Seed,
    bars,
    check_file,
    load,
    write_json,
)
from .output import emit, note, show, table

if TYPE_CHECKING:
    from ..tracing import AverageTrace, Trace


def trace(
    prompt: Annotated[str | None, typer.Option(help="The text before the answer.")] = None,
    subject: Annotated[
        str | None, typer.Option(help="What it is about: in the prompt once, or where {} stands.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="The answer to measure; default: the model's own.")
    ] = None,
    facts: Annotated[
        Path | None,
        typer.Option(help="Instead of a prompt: JSON list of facts with prompt, subject and attribute."),
    ] = None,
    rows: Annotated[int, typer.Option(help="How many facts that the model knows to average over.")] = 50,
    model: Model = "smollm2",
    kind: Annotated[
        list[str] | None, typer.Option(help="hidden (default), mlp or attention; may be repeated.")
    ] = None,
    window: Annotated[int, typer.Option(help="Layers restored at once, for mlp and attention.")] = 10,
    noise: Annotated[float, typer.Option(help="In standard deviations of the embeddings.")] = 3.0,
    samples: Annotated[int, typer.Option(help="Corrupted copies of each prompt.")] = 10,
    batch: Annotated[int | None, typer.Option(help="Rows in one forward pass; default: by length.")] = None,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
    out: Annotated[
        list[Path] | None, typer.Option(help="File to write: .png, .svg, .pdf or .json; repeatable.")
    ] = None,
) -> None:
    """Corrupt a subject, and show which states bring the answer back.

    Example: engram trace --prompt "{} is located in the city of" --subject "The Eiffel Tower" --out trace.png
    """
    from .. import tracing

    kinds = list(dict.fromkeys(kind or ["hidden"]))
    for name in kinds:
        if name not in tracing.KINDS:
            raise ValueError(f"kind: expected hidden, mlp or attention, got {name!r}")
    if facts is None and (prompt is None or subject is None):
        raise ValueError("prompt: expected one with its subject, or facts, got neither")
    if facts is not None and not (prompt is None and subject is None and target is None):
        raise ValueError("facts: expected no prompt, subject or target beside them, got one")
    if rows < 1:
        raise ValueError(f"rows: expected at least 1, got {rows}")
    for path in out or []:
        _check_out(path)
    listed = [] if facts is None else _read_facts(facts)
    options = {"window": window, "noise": noise, "samples": samples, "batch": batch, "seed": seed}

    found: list[Trace | AverageTrace]
    with bars() as progress:
        network, tokenizer = load(progress, model, dtype, device)
        if facts is None:
            found = [
                tracing.trace(
                    network, tokenizer, prompt, subject, name, target=target, progress=progress, **options
                )
                for name in kinds
            ]
        else:
            options["sigma"] = tracing.embedding_std(network, tokenizer, [row["subject"] for row in listed])
            traces: dict[str, list[Trace]] = {name: [] for name in kinds}
            right = (row for row in listed if tracing.known(network, tokenizer, row))
            for done, row in zip(range(1, rows + 1), right, strict=False):
                for name in kinds:
                    traces[name].append(
                        tracing.trace(network, tokenizer, row["prompt"], row["subject"], name, **options)
                    )
                progress("facts", done, rows, escape(row["subject"]))
            if not traces[kinds[0]]:
                raise EngramError(f"facts: expected one that {model} knows, got none of {len(listed)}")
            found = [tracing.average(traces[name]) for name in kinds]

    for one in found:
        show(_table(one))
    emit([one.to_dict() for one in found])
    for path in out or []:
        if path.suffix.lower() == ".json":
            write_json(path, [one.to_dict() for one in found])
        else:
            tracing.draw(found, path)
        note(f"Saved to {path}.")


def _check_out(path: Path) -> None:
    """Prove, before any work, that a file of that name can be written."""
    from .. import _plots
    from ..tracing.plots import SUFFIXES

    if path.suffix.lower() != ".json":
        _plots.check(path, "out", (*SUFFIXES, ".json"))
    check_file("out", path)


def _read_facts(path: Path) -> list[dict]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"facts: expected a JSON file, got {str(path)!r} ({reason})") from None
    fields = ("prompt", "subject", "attribute")
    if not isinstance(content, list) or not all(
        isinstance(row, dict) and all(isinstance(row.get(name), str) for name in fields) for row in content
    ):
        raise ValueError(f"facts: expected a list of objects with {', '.join(fields)}, got {str(path)!r}")
    if not content:
        raise ValueError(f"facts: expected at least one, got none in {str(path)!r}")
    for number, row in enumerate(content):
        try:
            check_prompt(row["subject"], row["prompt"])
            check_text("attribute", row["attribute"])
        except ValueError as error:
            raise ValueError(f"facts: expected ones that can be traced, got row {number} ({error})") from None
    return content


def _table(found: "Trace | AverageTrace") -> Table:
    """The layer of the largest effect, for every token or role."""
    effects = found.indirect_effects
    what = found.kind if found.kind == "hidden" else f"{found.kind}, windows of {found.window} layers"
    answer = getattr(found, "answer", "the answer")
    largest = table(
        "token", "layer", "effect", numbers=("layer", "effect"), title=f"Largest indirect effect: {what}",
        caption=f"p({answer}): {found.clean:.4f} clean, {found.corrupted:.4f} corrupted",
    )  # fmt: skip
    for label, row in zip(found.labels, effects, strict=True):
        best = int(row.argmax())
        said = ("", "") if row.isnan().any() else (str(best), f"{row[best]:+.4f}")
        largest.add_row(escape(label), *said)
    return largest
