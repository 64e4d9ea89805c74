"""Continual learning and unlearning in one state: what tasks that are learnt later do to those before.

    python examples/continual_memory.py

Eight tasks of eight pairs each go into a state of 64 dimensions, one after the other. A task's forgetting is
its squared error after the last task less that just after it was written. Then one pair of a ridge memory is
taken out again. Means over seeds; nothing is trained. `docs/ridge-memory.md` shows the tables.
"""

from statistics import mean
from typing import Annotated

import memory_tasks
import typer
from rich.console import Console
from rich.table import Table


def main(seeds: Annotated[int, typer.Option(min=1, help="How many draws.")] = 5) -> None:
    """Measure and print."""
    console = Console()
    table = Table("rule", "just after", "after the last", "forgetting", "the first, after the last")
    for rule in memory_tasks.RULES:
        runs = [memory_tasks.continual(rule, seed=seed) for seed in range(seeds)]
        learnt = mean(mean(after[-1] for after in run) for run in runs)
        last = mean(mean(run[-1]) for run in runs)
        first = mean(run[-1][0] for run in runs)
        table.add_row(rule, *(f"{value:.3f}" for value in (learnt, last, last - learnt, first)))
    console.print(table)
    for name, value in memory_tasks.unlearning().items():
        console.print(f"{name}: {value:.3g}")


if __name__ == "__main__":
    typer.run(main)
