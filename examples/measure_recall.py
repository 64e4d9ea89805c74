"""What an episodic memory recalls of facts, by latents alone: no language model answers here.

    python examples/measure_recall.py --data counterfact_dev.json --plot recall.png --report recall.json

One fact at a time, written one after the other, half of them forgotten, a long context, and by the number of
facts for each slot. A fact is asked for by its prompt (key) and by a paraphrase (question). Recall: the
readout is nearest to the fact's own value among all. Choice: it is nearer to the prompt with the new answer
than to the prompt with the true one. `docs/memory.md` shows the tables. Data: rows of CounterFact; a file
that is not here is looked for in the folder that ENGRAM_DATA names.
"""

import os
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Annotated

import recall
import torch
import typer
from recall import Load, Recall
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engram_kernels import __version__
from engram_kernels._io import write_json
from engram_kernels._plots import SERIES, figure_file
from engram_kernels._plots import check as check_picture
from engram_kernels.evaluation import read_cases
from engram_kernels.memory import load_encoder

# Two lines each, so that a table fits a narrow terminal.
SHARES = {
    "key": "recall\nkey",
    "question": "recall\nquestion",
    "choice_key": "choice\nkey",
    "choice_question": "choice\nquestion",
}


def main(
    data: Annotated[Path, typer.Option(help="Rows of CounterFact, JSON or JSON lines.")],
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 512,
    start: Annotated[int, typer.Option(min=0, help="The first row, counted from 0.")] = 0,
    slots: Annotated[int, typer.Option(min=1, help="Slots of the memory.")] = 256,
    encoder: Annotated[str, typer.Option(help="minilm, a folder, or a Hub name.")] = "minilm",
    share: Annotated[float, typer.Option(help="Of the facts, how many to forget.")] = 0.5,
    plot: Annotated[Path | None, typer.Option(help="PNG file: recall and leverage against N/K.")] = None,
    report: Annotated[Path | None, typer.Option(help="JSON file for all figures.")] = None,
    device: Annotated[str, typer.Option(help="Where texts are encoded.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the memories, and of what is forgotten.")] = 0,
) -> None:
    """Measure, print the tables, and write the picture and the report."""
    if plot is not None:
        check_picture(plot, "plot")
    folder = os.environ.get("ENGRAM_DATA")
    cases = read_cases(Path(folder) / data if folder and not data.exists() else data, start, rows).cases
    encoder_module = load_encoder(encoder, device=device)
    facts = recall.encode_cases(cases, encoder_module)
    # As many as slots, where a memory is at its limit.
    some = facts[:slots]
    stops = [max(1, len(some) >> shift) for shift in (3, 2, 1, 0)]
    halved = max(1, slots // 2)
    forgotten, apart = recall.forgetting(some, slots, share, seed=seed)
    found = {
        "One fact at a time": recall.single(some, slots, seed),
        "Written one after the other": recall.sequential(some, slots, stops, seed=seed),
        f"{share:.0%} forgotten": forgotten,
        f"A long context, {halved:,} slots": recall.long_context(
            facts, halved, [max(2, halved // 8), max(2, halved // 2)], seed
        ),
    }
    loads = recall.capacity(facts, slots, seed=seed)
    console = Console()
    for title, results in found.items():
        console.print(recall_table(title, results))
    console.print(f"The memory differs from one that never knew them by {apart:.1e} of its norm.")
    console.print(load_table(loads))
    if plot is not None:
        draw(loads, plot, f"{slots} slots, {encoder_module.name}")
    if report is not None:
        settings = {"data": data.name, "rows": len(cases), "start": start, "slots": slots, "encoder": encoder}
        content = {
            "settings": settings | {"share": share, "seed": seed},
            "versions": {"engram_kernels": __version__, "torch": torch.__version__},
            "difference_from_never_known": apart,
            "recall": {title: [row._asdict() for row in results] for title, results in found.items()},
            "capacity": [item._asdict() | {"recall": item.recall._asdict()} for item in loads],
        }
        write_json(report, content)


def recall_table(title: str, rows: Sequence[Recall]) -> Table:
    table = Table(title=escape(title), box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in ("facts", *SHARES.values()):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.setting, f"{row.facts:,}", *(f"{getattr(row, name):.3f}" for name in SHARES))
    return table


def load_table(loads: Sequence[Load]) -> Table:
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


def draw(loads: Sequence[Load], path: Path, title: str = "") -> None:
    """Draw recall, choice and leverages against the load as a PNG file."""
    series: dict[str, list[Load]] = {}
    for item in sorted(loads, key=lambda item: item.load):
        series.setdefault(item.series, []).append(item)
    with figure_file(path, (11.7, 3.8)) as figure:
        axes = figure.subplots(1, 3)
        for (label, mine), (colour, marker) in zip(series.items(), cycle(SERIES), strict=False):
            look = {"color": colour, "marker": marker, "markersize": 4}
            for panel, share in zip(axes, ("question", "choice_question"), strict=False):
                shares = [getattr(item.recall, share) for item in mine]
                panel.plot([item.load for item in mine], shares, label=label, **look)
            held = [(item.load, *item.leverages) for item in mine if item.leverages is not None]
            if held:
                at, least, mean, largest = zip(*held, strict=True)
                axes[-1].plot(at, mean, **look)
                axes[-1].fill_between(at, least, largest, color=colour, alpha=0.15, linewidth=0)
        titles = ("recall by question", "choice by question", "leverage: mean, least, largest")
        for panel, name in zip(axes, titles, strict=True):
            panel.set_title(name)
            panel.set_xlabel("rows for each slot, N/K")
            panel.set_ylim(0, 1.04)
            panel.axvline(1, color="0.6", linewidth=0.8, linestyle=":")
            panel.grid(axis="y", color="0.92")
            panel.set_axisbelow(True)
        figure.suptitle(title)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(series))


if __name__ == "__main__":
    typer.run(main)
