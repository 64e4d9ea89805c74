"""Published figures on CounterFact, beside those of a report that `engram eval` wrote.

    python examples/published.py            the table
    python examples/published.py out.json   and the report's row

They are context, not a comparison: other models, other samples, other numbers of edits. Shares are those of
efficacy, paraphrase and neighbourhood success (ES, PS, NS): in how many cases the right answer is likelier
than the other one, which says little of what a model writes. Fluency is the papers' generation entropy (GE)
over a hundred, in bits.

Sources:
    ROME: Meng et al. 2022, arXiv 2202.05262, table 4: one edit at a time, 7,500 cases (GPT-2 XL) and 2,000
        (GPT-J 6B).
    MEMIT: Meng et al. 2023, arXiv 2210.07229, table 2: 10,000 edits of GPT-J 6B at once.
    AlphaEdit: Fang et al. 2024, arXiv 2410.02355, table 1: 2,000 edits of Llama-3 8B, a hundred at a time.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

# The papers' names, and whose answers `engram eval` compares by probability for them.
MEASURES = {
    "efficacy": ("prompt",),
    "paraphrase": ("paraphrase", "generation prompt"),
    "locality": ("locality",),
    "fluency": (),
}
# Method, model and edits; the measures in percent, as the papers print them.
PUBLISHED = (
    ("ROME, GPT-2 XL, 1 at a time", 100.0, 96.4, 75.4, 621.9),
    ("ROME, GPT-J 6B, 1 at a time", 99.9, 99.1, 78.9, 620.1),
    ("MEMIT, GPT-J 6B, 10,000", 98.9, 88.6, 73.7, 619.9),
    ("AlphaEdit, Llama-3 8B, 2,000", 98.90, 94.22, 67.88, 622.49),
)


def likelier(aspects: dict, names: tuple[str, ...]) -> float | None:
    """The share of the first aspect that the report has."""
    found = next((aspects[name] for name in names if name in aspects), {})
    return found["likelier"]["edited"] if "likelier" in found else None


def main(
    report: Annotated[Path | None, typer.Argument(help="What `engram eval --report` wrote.")] = None,
) -> None:
    """Print the table."""
    table = Table("method, model, edits", title="CounterFact: other models, samples and numbers of edits")
    for name in MEASURES:
        table.add_column(name, justify="right")
    for label, *percent in PUBLISHED:
        table.add_row(label, *(f"{value / 100:.3f}" for value in percent))
    if report is not None:
        content = json.loads(report.read_text(encoding="utf-8"))
        settings, summary = content["settings"], content["summary"]
        table.add_section()
        label = f"{settings['method']}, {settings['model']}, {summary['rows']:,}"
        shown = [likelier(summary["aspects"], aspects) for aspects in MEASURES.values()]
        if summary["fluency"] is not None:
            shown[-1] = summary["fluency"]["edited"]
        table.add_row(label, *("" if share is None else f"{share:.3f}" for share in shown))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
