"""Hebb's rule, the delta rule, ridge regression and softmax attention on three tasks, in one figure.

    python examples/measure_memory_tasks.py --plot memory-tasks.png --report memory-tasks.json

Recall and in-context regression need no training: pairs are written, then read. The third task trains a model
of two layers for each rule, the same but for the rule, on associative recall. Every figure is a mean over
seeds. `docs/ridge-memory.md` shows them.
"""

import time
from pathlib import Path
from statistics import mean
from typing import Annotated

import memory_tasks as tasks
import torch
import typer
from rich.console import Console
from rich.table import Table

from engram_kernels import __version__
from engram_kernels._io import write_json
from engram_kernels._plots import SERIES, figure_file
from engram_kernels._plots import check as check_picture

RECALL = (8, 16, 32, 48, 64, 80, 96)
REGRESSION = (8, 16, 32, 64, 128, 256)
TRAINED, ASKED = (4, 8, 16, 24), (4, 8, 12, 16, 20, 24, 32)
AXES = {
    "recall": ("Recall, untrained: 64 dimensions", "pairs", "share of values recalled", 64),
    "regression": ("In-context regression, 32 dimensions", "pairs", "squared error over that of 0", 32),
    "trained": ("Recall, trained: 16 dimensions", "pairs", "share of queries answered", 16),
}


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each model.")] = 1000,
    seeds: Annotated[int, typer.Option(min=1, help="Models of each rule, and draws of each task.")] = 2,
    plot: Annotated[Path | None, typer.Option(help="PNG file.")] = None,
    report: Annotated[Path | None, typer.Option(help="JSON file for all figures.")] = None,
) -> None:
    """Measure, print the tables, and write the picture and the report."""
    if plot is not None:
        check_picture(plot, "plot")
    console = Console()
    found: dict[str, dict[str, dict[int, float]]] = {task: {} for task in AXES}
    seconds: dict[str, float] = {}

    def say(stage: str, done: int, total: int) -> None:
        if done % 100 == 0:
            console.print(f"{done} of {total}: {stage}")

    for rule in tasks.RULES:
        found["recall"][rule] = {
            n: mean(tasks.recall(rule, n, seed=seed) for seed in range(seeds)) for n in RECALL
        }
        found["regression"][rule] = {
            n: mean(tasks.regression(rule, n, seed=seed) for seed in range(seeds)) for n in REGRESSION
        }
        begin = time.process_time()
        models = [tasks.train(rule, steps, TRAINED, seed=seed, progress=say) for seed in range(seeds)]
        seconds[rule] = round(time.process_time() - begin, 1)
        found["trained"][rule] = {n: mean(tasks.accuracy(model, n) for model in models) for n in ASKED}
    for task, rules in found.items():
        table = Table(title=AXES[task][0])
        table.add_column("pairs")
        for n in next(iter(rules.values())):
            table.add_column(str(n))
        for rule, values in rules.items():
            table.add_row(rule, *(f"{value:.3f}" for value in values.values()))
        console.print(table)
    console.print(f"CPU seconds of the training, {torch.get_num_threads()} threads: {seconds}")
    if report is not None:
        settings = {"version": __version__, "torch": torch.__version__, "steps": steps, "seeds": seeds}
        write_json(report, {**settings, "trained_on": TRAINED, "cpu_seconds": seconds, **found})
    if plot is not None:
        draw(plot, found)


def draw(path: Path, found: dict[str, dict[str, dict[int, float]]]) -> None:
    with figure_file(path, (10, 3.2)) as figure:
        for axes, (task, rules) in zip(figure.subplots(1, 3), found.items(), strict=True):
            title, x, y, dimensions = AXES[task]
            for (colour, marker), (rule, values) in zip(SERIES, rules.items(), strict=False):
                axes.plot(values.keys(), values.values(), color=colour, marker=marker, ms=4, label=rule)
            axes.axvline(dimensions, color="0.7", lw=0.8, ls="--")
            axes.set(title=title, xlabel=x, ylabel=y)
            if task == "regression":
                axes.set(xscale="log", yscale="log")
        figure.axes[0].legend()


if __name__ == "__main__":
    typer.run(main)
