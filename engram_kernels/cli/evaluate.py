"""`engram eval`: do edits hold, generalise, and leave the rest alone."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .common import (
    Corpus,
    Device,
    Dtype,
    Model,
    Seed,
    Tokens,
    bars,
    check_file,
    check_picture,
    console,
    data_file,
    device_of,
    load,
    versions,
)

if TYPE_CHECKING:
    from ..evaluation.outcomes import Outcome
    from ..evaluation.run import Evaluation

MODES = ("each", "together")
MEASURES = {
    "efficacy": "efficacy",
    "paraphrase": "paraphrase",
    "locality": "locality",
    "score": "score, their harmonic mean",
    "efficacy_tokens": "efficacy, tokens right",
    "paraphrase_tokens": "paraphrase, tokens right",
    "locality_tokens": "locality, tokens right",
    "locality_unchanged": "locality, tokens unchanged",
    "score_tokens": "score, tokens right and unchanged",
    "fluency": "fluency, bits",
}


def evaluate(
    data: Annotated[
        Path,
        typer.Option(
            help="Rows of CounterFact or zsRE, JSON or JSON lines; also looked for in $ENGRAM_DATA."
        ),
    ],
    model: Model = "smollm2",
    rows: Annotated[int | None, typer.Option(help="How many rows; default: all from --start on.")] = None,
    start: Annotated[int, typer.Option(help="The first row, counted from 0.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out rows that cannot be read.")] = False,
    method: Annotated[str, typer.Option(help="engram, rome, memit, encore, …: docs/methods.md.")] = "engram",
    mode: Annotated[
        str,
        typer.Option(
            help="each: every row edited and reverted by itself; together: all rows, then measured."
        ),
    ] = "each",
    layer: Annotated[
        list[int] | None, typer.Option(help="A decoder layer to write; may be repeated; default: by method.")
    ] = None,
    ridge: Annotated[
        float | None,
        typer.Option(help="How much of a change is given up for smaller writes; default: by method."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="How many edits are written at once; default: by method.")
    ] = None,
    preserve: Annotated[
        bool | None, typer.Option(help="Hold the answers to earlier batches; default: by method.")
    ] = None,
    null_space: Annotated[
        float | None,
        typer.Option(
            help="Largest eigenvalue that a write may touch, as a share of the mean one; default: by method."
        ),
    ] = None,
    conflicts: Annotated[
        str, typer.Option(help="Edits written at once that have one key: refuse, or make the last.")
    ] = "refuse",
    failures: Annotated[str, typer.Option(help="An edit that cannot be done: raise, or skip it.")] = "raise",
    checkpoint: Annotated[
        list[int] | None, typer.Option(help="With together, measure the first n edits; default: 10, 50, 100.")
    ] = None,
    fluency: Annotated[int, typer.Option(help="Tokens to write for the fluency; 0: leave it out.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Texts measured at a time.")] = 32,
    corpus: Corpus = None,
    tokens: Tokens = None,
    steps: Annotated[int | None, typer.Option(help="Of the value's optimisation.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the value's optimisation.")] = None,
    clamp: Annotated[float | None, typer.Option(help="Largest change of a value, in its norms.")] = None,
    stop_loss: Annotated[float | None, typer.Option(help="The optimisation ends below this loss.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of the value's optimisation.")] = None,
    original_key: Annotated[
        bool, typer.Option("--original-key", help="ROME as first published, not R-ROME.")
    ] = False,
    contexts: Annotated[
        list[str] | None,
        typer.Option(help="Texts before a prompt, TOKENSxCOUNT; may be repeated; default: 5x10 and 10x10."),
    ] = None,
    bare_prompt_weight: Annotated[float, typer.Option(help="Share of the bare prompt's key.")] = 0.5,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
    report: Annotated[
        Path | None,
        typer.Option(help="JSON file; a run that was cut off is gone on with by the same command."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file for the measures.")] = None,
) -> None:
    """Edit rows of a data set, and measure what the edits do.

    Example: engram eval --data counterfact.json --rows 20 --method rome --report out.json --plot out.png
    """
    from ..editing import Editor
    from ..editing.methods import METHODS, check_choices
    from ..evaluation.datasets import COUNTERFACT, read_cases
    from ..evaluation.outcomes import summarise
    from ..evaluation.report import EvalReport
    from ..evaluation.run import CHECKPOINTS, Evaluation, peak_memory

    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    check_choices(method, batch, conflicts, failures)
    if fluency < 0:
        raise ValueError(f"fluency: expected at least 0, got {fluency}")
    check_picture("plot", plot)
    check_file("report", report)
    path = data_file(data)
    cases, refused = read_cases(path, start, rows, skip_bad)
    given = {"steps": steps, "learning_rate": learning_rate, "clamp": clamp, "stop_loss": stop_loss}
    given["weight_decay"] = weight_decay
    asked = {name: option for name, option in given.items() if option is not None}
    value = replace(METHODS[method].value, **asked)
    options = {"layers": layer or None, "method": method, "ridge": ridge, "batch": batch}
    options |= {"preserve": preserve, "null_space": null_space, "conflicts": conflicts, "failures": failures}
    checkpoints = tuple(checkpoint or CHECKPOINTS)
    pairs = {"contexts": _pairs(contexts)} if contexts else {}
    settings = {
        "model": model, "data": data.name, "sha256": _digest(path),
        "start": start, "rows": rows, "skip_bad": skip_bad, "mode": mode, **options,
        "checkpoints": checkpoints, "fluency": fluency, "batch_size": batch_size,
        "corpus": None if corpus is None else _digest(corpus), "tokens": tokens, **given,
        "original_key": original_key, **pairs, "bare_prompt_weight": bare_prompt_weight,
        "dtype": dtype, "device": device_of(device), "seed": seed,
    }  # fmt: skip
    run = None if report is None else report.with_name(f"{report.name}.run")
    with bars() as progress:
        network, tokenizer = load(progress, model, dtype, device)
        editor = Editor(
            network, tokenizer, corpus=corpus, tokens=tokens, seed=seed,
            bare_prompt_weight=bare_prompt_weight, consistent_key=not original_key,
            value=value, progress=progress, **pairs,
        )  # fmt: skip
        evaluation = Evaluation(
            editor, options, fluency_tokens=fluency, batch_size=batch_size, seed=seed, progress=progress
        )
        settings["weights"] = evaluation.weights
        kept = None if report is None else EvalReport(report, settings, versions())
        if kept is not None and kept.complete:
            outcomes, retained, summary = kept.outcomes, kept.retained, kept.summary
            console.print(f"{escape(str(report))} is complete: nothing was measured again.")
        else:
            evaluation.prepare()
            if mode == "each":
                outcomes, retained = _each(evaluation, cases, start, kept), []
            else:
                outcomes, retained = evaluation.together(cases, checkpoints, run)
            summary = summarise(outcomes) | {
                "refused": refused,
                "weights_as_before": evaluation.weights_as_before(),
                "peak_memory": peak_memory(network.get_input_embeddings().weight.device),
            }
            if kept is not None:
                kept.write(outcomes, retained, summary)
            if kept is not None and mode == "together":
                shutil.rmtree(run, ignore_errors=True)
    console.print(_table(summary, f"{data.name}, {model}, {method}, {mode}"))
    if all(case.kind == COUNTERFACT for case in cases):
        console.print("[dim]Published figures on CounterFact, for context: examples/published.py[/dim]")
    for item in retained:
        console.print(
            f"first {item.first:,} of {item.edits:,} edits: efficacy {item.efficacy:.3f}", highlight=False
        )
    for line in [*refused, *_skipped(outcomes)]:
        console.print(f"Left out: {escape(line)}", highlight=False, soft_wrap=True)
    if plot is not None:
        from ..evaluation import plots

        title = f"{data.name}, {summary['rows']:,} rows, {Path(model).name}, {method}"
        plots.draw_measures(summary["unedited"], summary["edited"], plot, retained, title)


def _each(evaluation: "Evaluation", cases, start: int, kept) -> list["Outcome"]:
    def keep(outcomes: list["Outcome"]) -> None:
        if kept is not None:
            kept.write(outcomes)
        console.print(_line(start + len(outcomes) - 1, outcomes[-1]), highlight=False, soft_wrap=True)

    return evaluation.each(cases, kept.outcomes if kept is not None else (), keep)


def _pairs(contexts: list[str]) -> tuple[tuple[int, int], ...]:
    """`10x5` is five texts of ten tokens."""
    try:
        pairs = tuple(tuple(map(int, text.split("x"))) for text in contexts)
    except ValueError:
        pairs = ()
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"contexts: expected TOKENSxCOUNT such as 10x5, got {', '.join(contexts)!r}")
    return pairs


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _line(number: int, outcome: "Outcome") -> str:
    from ..evaluation.measures import ASPECTS

    if outcome.after is None:
        return escape(f"{number:5d}  skipped  {outcome.edit}")
    marks = " ".join(f"{aspect} {outcome.after.successes(aspect):.2f}" for aspect in ASPECTS)
    return escape(f"{number:5d}  {outcome.seconds:5.1f} s  {marks}  {outcome.edit}")


def _skipped(outcomes: list["Outcome"]) -> list[str]:
    return [f"{outcome.edit}: {outcome.skipped}" for outcome in outcomes if outcome.skipped]


def _table(summary: dict, title: str) -> Table:
    table = Table(title=escape(title))
    table.add_column("measure", no_wrap=True)
    for name in ("unedited", "edited"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, label in MEASURES.items():
        if name in summary["edited"]:
            table.add_row(label, *(f"{summary[state][name]:.3f}" for state in ("unedited", "edited")))
    table.add_section()
    seconds, memory = summary["median_seconds"], summary["peak_memory"]
    for label, cell in (
        ("seconds an edit, median", "cut off" if seconds is None else f"{seconds:.1f}"),
        ("reverted bit for bit", f"{summary['reverted_exactly']}/{summary['rows']}"),
        ("all weights as before", "yes" if summary["weights_as_before"] else "[red]no[/red]"),
        ("peak memory, MiB", "unknown" if memory is None else f"{memory / 2**20:,.0f}"),
        ("rows left out", str(summary["skipped"] + len(summary["refused"]))),
    ):
        table.add_row(label, "", cell)
    return table
