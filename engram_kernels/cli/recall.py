"""`engram memory evaluate`: what a memory recalls, by latents alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .common import (
    Device,
    Seed,
    bars,
    check_file,
    check_picture,
    console,
    data_file,
    device_of,
    versions,
    write_json,
)

if TYPE_CHECKING:
    from ..evaluation.memory import Load, Recall

# Two lines each, so that a table fits a narrow terminal.
SHARES = {
    "key": "recall\nkey",
    "question": "recall\nquestion",
    "choice_key": "choice\nkey",
    "choice_question": "choice\nquestion",
}


def evaluate(
    data: Annotated[
        Path,
        typer.Option(help="Rows of CounterFact, JSON or JSON lines; also looked for in $ENGRAM_DATA."),
    ],
    rows: Annotated[int, typer.Option(help="How many rows.")] = 512,
    start: Annotated[int, typer.Option(help="The first row, counted from 0.")] = 0,
    slots: Annotated[int, typer.Option(help="Slots of the memory.")] = 256,
    encoder: Annotated[str, typer.Option(help="minilm, a folder, or a Hub name.")] = "minilm",
    share: Annotated[float, typer.Option(help="Of the facts, how many to forget.")] = 0.5,
    plot: Annotated[Path | None, typer.Option(help="PNG file: recall and leverage against N/K.")] = None,
    report: Annotated[Path | None, typer.Option(help="JSON file for all figures.")] = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Measure what a memory recalls of facts: one at a time, in sequence, by its load, after forgetting.

    A fact is asked for by its prompt (key) and by a paraphrase (question). Recall: the readout is nearest to
    the fact's own value among all. Choice: it is nearer to the prompt with the new answer than to the prompt
    with the true one.

    Example: engram memory evaluate --data counterfact_dev.json --plot recall.png
    """
    for name, value in (("rows", rows), ("slots", slots)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not 0 < share < 1:
        raise ValueError(f"share: expected between 0 and 1, got {share}")
    check_picture("plot", plot)
    check_file("report", report)
    from ..evaluation import memory as measured
    from ..evaluation import read_cases
    from ..memory import load_encoder, plots

    cases = read_cases(data_file(data), start, rows).cases
    spoken = load_encoder(encoder, device=device_of(device))
    with bars() as progress:
        facts = measured.encode_cases(cases, spoken, progress=progress)
        # As many as slots, where a memory is at its limit.
        some = facts[:slots]
        progress("measure", 0, 5)
        single = measured.single(some, slots, seed)
        progress("measure", 1, 5)
        stops = [max(1, len(some) >> shift) for shift in (3, 2, 1, 0)]
        sequential = measured.sequential(some, slots, stops, seed=seed)
        progress("measure", 2, 5)
        forgotten, apart = measured.forgetting(some, slots, share, seed=seed)
        progress("measure", 3, 5)
        loads = measured.capacity(facts, slots, seed=seed)
        progress("measure", 4, 5)
        halved = max(1, slots // 2)
        long = measured.long_context(facts, halved, [max(2, halved // 8), max(2, halved // 2)], seed)
        progress("measure", 5, 5)
    for title, found in (
        ("One fact at a time", single),
        ("Written one after the other", sequential),
        (f"{share:.0%} forgotten", forgotten),
        (f"A long context, {halved:,} slots", long),
    ):
        console.print(_table(title, found))
    console.print(f"The memory differs from one that never knew them by {apart:.1e} of its norm.")
    console.print(_loads(loads))
    if plot is not None:
        points = [
            plots.Point(
                item.series,
                item.load,
                {
                    "recall by question": item.recall.question,
                    "choice by question": item.recall.choice_question,
                },
                item.leverages,
            )
            for item in loads
        ]
        plots.capacity(points, plot, f"{slots} slots, {spoken.name}")
    if report is not None:
        settings = {"data": data.name, "rows": len(cases), "start": start, "slots": slots, "encoder": encoder}
        content = {
            "settings": settings | {"share": share, "seed": seed},
            "versions": versions(),
            "single": [row._asdict() for row in single],
            "sequential": [row._asdict() for row in sequential],
            "forgetting": [row._asdict() for row in forgotten],
            "difference_from_never_known": apart,
            "long_context": {"slots": halved, "rows": [row._asdict() for row in long]},
            "capacity": [item._asdict() | {"recall": item.recall._asdict()} for item in loads],
        }
        write_json(report, content)


def _table(title: str, rows: list[Recall]) -> Table:
    table = Table(title=escape(title), box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in ("facts", *SHARES.values()):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.setting, f"{row.facts:,}", *(f"{getattr(row, name):.3f}" for name in SHARES))
    return table


def _loads(loads: list[Load]) -> Table:
    """A row for each load, and for each series the two shares that a question gets."""
    table = Table(title="By facts for each slot: recall/choice by question", box=box.SIMPLE_HEAD)
    series = list(dict.fromkeys(item.series for item in loads))
    for name in ("N/K", "facts", *series, "λ"):
        table.add_column(name, justify="right")
    found = {(item.load, item.series): item for item in loads}
    for load in dict.fromkeys(item.load for item in loads):
        mine = [found[load, name] for name in series]
        shares = [f"{item.recall.question:.2f}/{item.recall.choice_question:.2f}" for item in mine]
        table.add_row(f"{load:.3g}", f"{mine[0].recall.facts:,}", *shares, f"{mine[0].ridge:.2g}")
    table.caption = "[dim]λ: of leave-one-out[/dim]"
    return table
