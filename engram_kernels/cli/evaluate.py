"""`engram eval`: do edits hold, generalise, and leave the rest alone."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .._io import file_checksum
from ..hf.placement import input_device
from .common import (
    Corpus,
    Device,
    Dtype,
    Layers,
    Method,
    Model,
    Seed,
    Tokens,
    Values,
    bars,
    check_file,
    check_picture,
    data_file,
    device_of,
    group_of_ranks,
    layers_of,
    load,
    versions,
)
from .output import emit, note, show, table

if TYPE_CHECKING:
    from ..evaluation.outcomes import Outcome, Retained
    from ..evaluation.run import Evaluation

MODES = ("each", "together")
# Of a table: what is seen comes first, what compares probabilities last and named so.
COLUMNS = {
    "begins": "begins with",
    "contains": "contains",
    "exact": "is",
    "passed": "passes",
    "judged": "judged",
    "overlap": "words of it",
    "argmax": "all tokens likeliest",
    "likelier": "likelier than the other",
}
KEPT = {
    "first_token_kept": "first token kept",
    "text_kept": "text kept",
    "tokens_kept": "answer's tokens kept",
}
DRIFT = {
    "text_loss": "loss on a fixed text",
    "perplexity": "its perplexity",
    "known_facts": "known facts still answered",
}


def evaluate(
    data: Annotated[
        Path,
        typer.Option(
            help="Rows of a published data set, JSON or JSON lines; also looked for in $ENGRAM_DATA."
        ),
    ],
    model: Model = "smollm2",
    rows: Annotated[int | None, typer.Option(help="How many rows; default: all from --start on.")] = None,
    start: Annotated[int, typer.Option(help="The first row, counted from 0.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out rows that cannot be read.")] = False,
    zsre: Annotated[str, typer.Option(help="zsRE by whose protocol: memit or easyedit.")] = "memit",
    chat: Annotated[
        bool, typer.Option("--chat", help="Edit and ask by the tokenizer's chat template.")
    ] = False,
    give: Annotated[
        int, typer.Option(help="So many of a row's paraphrases go into the edit, and are not asked.")
    ] = 0,
    method: Method = "engram",
    mode: Annotated[
        str,
        typer.Option(
            help="each: every row edited and reverted by itself; together: all rows, then measured."
        ),
    ] = "each",
    layers: Layers = None,
    values: Values = None,
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
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="Also another library's method, such as easyedit:rome; may be repeated."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="A program that reads answers as JSON lines and writes a number a line."),
    ] = None,
    drift_text: Annotated[
        Path | None, typer.Option(help="Text whose loss is taken; default: gensim's last articles.")
    ] = None,
    drift_rows: Annotated[int, typer.Option(help="Pieces of 128 tokens of it; 0: leave it out.")] = 4,
    known: Annotated[
        Path | None, typer.Option(help="Facts, as known_1000.json, of which those known are asked again.")
    ] = None,
    known_rows: Annotated[int, typer.Option(help="How many of them.")] = 50,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(help="A task of lm-evaluation-harness, before and after all edits; may be repeated."),
    ] = None,
    lm_eval_limit: Annotated[int | None, typer.Option(help="Examples of each task; default: all.")] = None,
    fluency: Annotated[int, typer.Option(help="Tokens to sample for the fluency; 0: leave it out.")] = 0,
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
    from ..editing.methods import check_choices, method_of
    from ..evaluation.datasets import read_cases
    from ..evaluation.drift import Drift, drift_rows_of, read_known
    from ..evaluation.judge import command_judge
    from ..evaluation.outcomes import summarise
    from ..evaluation.report import EvalReport
    from ..evaluation.run import CHECKPOINTS, Evaluation, peak_memory
    from ..integrations.easyedit import EasyEdit, check_baseline

    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    check_choices(method, batch, conflicts, failures, values)
    for name, count in (("fluency", fluency), ("drift_rows", drift_rows), ("give", give)):
        if count < 0:
            raise ValueError(f"{name}: expected at least 0, got {count}")
    for name in baseline or ():
        check_baseline(name)
    if lm_eval and mode == "each":
        raise ValueError("lm_eval: expected the mode together, whose edits stand at once, got each")
    check_picture("plot", plot)
    check_file("report", report)
    path = data_file(data)
    cases, refused = read_cases(path, start, rows, skip_bad, zsre)
    cases = [case.told(give, chat) for case in cases]
    facts = [] if known is None else read_known(data_file(known), known_rows)
    asked_judge = None if judge is None else command_judge(judge)
    given = {"steps": steps, "learning_rate": learning_rate, "clamp": clamp, "stop_loss": stop_loss}
    given["weight_decay"] = weight_decay
    asked = {name: option for name, option in given.items() if option is not None}
    value = replace(method_of(method).value, **asked)
    options = {"layers": layers_of(layers), "method": method, "ridge": ridge, "batch": batch}
    options |= {"preserve": preserve, "null_space": null_space, "conflicts": conflicts, "failures": failures}
    options |= {"values": values} if values else {}
    checkpoints = tuple(checkpoint or CHECKPOINTS)
    pairs = {"contexts": _pairs(contexts)} if contexts else {}
    settings = {
        "model": model, "data": data.name, "sha256": file_checksum(path),
        "start": start, "rows": rows, "skip_bad": skip_bad, "zsre": zsre, "chat": chat, "give": give,
        "mode": mode, **options, "checkpoints": checkpoints,
        "fluency": fluency, "batch_size": batch_size, "judge": judge,
        "drift_text": None if drift_text is None else file_checksum(drift_text), "drift_rows": drift_rows,
        "known": None if known is None else file_checksum(data_file(known)), "known_rows": known_rows,
        "corpus": None if corpus is None else file_checksum(corpus), "tokens": tokens, **given,
        "original_key": original_key, **pairs, "bare_prompt_weight": bare_prompt_weight,
        "dtype": dtype, "device": device_of(device), "seed": seed,
    }  # fmt: skip
    with bars() as progress:
        network, tokenizer = load(progress, model, dtype, device)
        if chat and not tokenizer.chat_template:
            raise ValueError("chat: expected a model whose tokenizer has a chat template, got one without")
        cases = _fitting(network, tokenizer, cases, refused, skip_bad, chat)
        texts = drift_rows_of(tokenizer, drift_text, drift_rows) if drift_rows else []
        drift = Drift(network, tokenizer, texts, facts, batch_size) if texts or facts else None

        def evaluate_by(editor, kept_at: Path | None, edit_options: dict, said: dict, how: str):
            """One method on all cases: outcomes, retention and summary, from a report or measured now."""
            evaluation = Evaluation(
                editor, edit_options, fluency_tokens=fluency, batch_size=batch_size, seed=seed, chat=chat,
                drift=drift, judge=asked_judge, progress=progress,
            )  # fmt: skip
            said = said | {"weights": evaluation.weights}
            kept = None if kept_at is None else EvalReport(kept_at, said, versions())
            if kept is not None and kept.complete:
                note(f"{kept_at} is complete: nothing was measured again.")
                return kept.outcomes, kept.retained, kept.summary
            evaluation.prepare()
            tasks = {"unedited": _tasks(network, tokenizer, lm_eval, lm_eval_limit)}
            retained: list[Retained] = []
            if how == "each":
                outcomes = _each(evaluation, cases, start, kept)
            else:
                run = None if kept_at is None else kept_at.with_name(f"{kept_at.name}.run")
                outcomes, retained = evaluation.together(
                    cases, checkpoints, run,
                    standing=lambda: tasks.update(edited=_tasks(network, tokenizer, lm_eval, lm_eval_limit)),
                )  # fmt: skip
            summary = summarise(outcomes) | {
                "refused": refused,
                "weights_as_before": evaluation.weights_as_before(),
                "peak_memory": peak_memory(input_device(network)),
                "lm_eval": tasks if lm_eval else None,
            }
            if kept is not None:
                kept.write(outcomes, retained, summary)
                if how == "together":
                    shutil.rmtree(run, ignore_errors=True)
            return outcomes, retained, summary

        editor = Editor(
            network, tokenizer, corpus=corpus, tokens=tokens, seed=seed,
            bare_prompt_weight=bare_prompt_weight, consistent_key=not original_key,
            value=value, progress=progress, group=group_of_ranks(), **pairs,
        )  # fmt: skip
        outcomes, retained, summary = evaluate_by(editor, report, options, settings, mode)
        compared = {f"{method}, {mode}": summary}
        for name in baseline or ():
            other = EasyEdit(check_baseline(name), editor, corpus)
            compared[name] = _baseline(name, other, report, settings, failures, evaluate_by)
    show(_table(summary, f"{data.name}, {Path(model).name}, {method}, {mode}"))
    if len(compared) > 1:
        show(_comparison(compared))
    for item in retained:
        show(f"first {item.first:,} of {item.edits:,} edits: begins with the target {item.begins:.3f}")
    left_out = [*refused, *_skipped(outcomes)]
    for line in left_out:
        show(f"Left out: {escape(line)}", wrap=False)
    emit(
        {
            "settings": settings,
            "summaries": compared,
            "retained": [item._asdict() for item in retained],
            "left_out": left_out,
        }
    )
    if plot is not None:
        from ..evaluation import plots

        title = f"{data.name}, {summary['rows']:,} rows, {Path(model).name}, {method}"
        plots.draw_measures(summary["aspects"], plot, retained, title)


def _fitting(network, tokenizer, cases: list, refused: list[str], skip_bad: bool, chat: bool) -> list:
    """The cases whose texts fit into the model's context, which hours of edits may come before."""
    from ..evaluation.measures import too_long

    fitting = []
    for case in cases:
        reason = too_long(network, tokenizer, case, chat)
        if reason is None:
            fitting.append(case)
        elif skip_bad:
            refused.append(f"data: case {case.name}: {reason}")
        else:
            raise ValueError(f"data: case {case.name}: {reason}; --skip-bad leaves it out")
    if not fitting:
        raise ValueError(f"data: expected rows that can be asked, got none: {refused[-1]}")
    return fitting


def _tasks(network, tokenizer, tasks: list[str] | None, limit: int | None) -> dict:
    """Numbers of lm-evaluation-harness on the model as it stands; none where no task is asked."""
    from ..evaluation.harness import run_tasks

    return run_tasks(network, tokenizer, tasks, limit) if tasks else {}


def _baseline(name: str, other, report: Path | None, settings: dict, failures: str, evaluate_by) -> dict:
    """Another library's method on the same cases, one by one, in a report of its own."""
    kept_at = None if report is None else report.with_name(f"{report.stem}.{name.replace(':', '-')}.json")
    said = settings | {"method": name, "mode": "each"}
    return evaluate_by(other, kept_at, {"failures": failures}, said, "each")[2]


def _each(evaluation: "Evaluation", cases, start: int, kept) -> list["Outcome"]:
    def keep(outcomes: list["Outcome"]) -> None:
        if kept is not None:
            kept.write(outcomes)
        note(_line(start + len(outcomes) - 1, outcomes[-1]))

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


def _line(number: int, outcome: "Outcome") -> str:
    if outcome.after is None:
        return f"{number:5d}  skipped  {outcome.edit}"
    marks = "  ".join(
        f"{aspect} {outcome.after.mean(aspect, 'begins'):.2f}" for aspect in outcome.after.aspects
    )
    return f"{number:5d}  {outcome.seconds:5.1f} s  {marks}  {outcome.edit}"


def _skipped(outcomes: list["Outcome"]) -> list[str]:
    return [f"{outcome.edit}: {outcome.skipped}" for outcome in outcomes if outcome.skipped]


def _table(summary: dict, title: str) -> Table:
    """What was answered before and after the edits: a row a measure, so that no number is folded."""
    numbers = ("questions", "unedited", "edited")
    found = table("asked", "questions", "the answer", *numbers[1:], numbers=numbers, title=title,
                  caption="means over cases")  # fmt: skip
    for aspect, measured in summary["aspects"].items():
        rows = [(label, measured[name]) for name, label in (COLUMNS | KEPT).items() if name in measured]
        for i, (label, states) in enumerate(rows):
            first = (escape(aspect), f"{measured['questions']:,}") if i == 0 else ("", "")
            found.add_row(*first, label, *_states(states, kept=label in KEPT.values()))
        found.add_section()
    for name, states in [*summary["drift"].items(), ("fluency, bits", summary["fluency"])]:
        if states is not None:
            found.add_row(DRIFT.get(name, name), "", "", *_states(states))
    for task, metrics in ((summary.get("lm_eval") or {}).get("edited") or {}).items():
        for metric, value in metrics.items():
            before = summary["lm_eval"]["unedited"][task].get(metric, float("nan"))
            found.add_row(
                escape(f"{task}, {metric}"), "", "", *_states({"unedited": before, "edited": value})
            )
    seconds, memory = summary["median_seconds"], summary["peak_memory"]
    for label, cell in (
        ("seconds an edit, median", "cut off" if seconds is None else f"{seconds:.1f}"),
        ("reverted bit for bit", f"{summary['reverted_exactly']}/{summary['rows']}"),
        ("all weights as before", "yes" if summary["weights_as_before"] else "[red]no[/red]"),
        ("peak memory, MiB", "unknown" if memory is None else f"{memory / 2**20:,.0f}"),
        ("rows left out", str(summary["skipped"] + len(summary["refused"]))),
    ):
        found.add_row(label, "", "", "", cell)
    return found


def _comparison(compared: dict[str, dict]) -> Table:
    """A column a method: answers that begin with the right one, and the locality's first tokens kept."""
    aspects = list(dict.fromkeys(aspect for summary in compared.values() for aspect in summary["aspects"]))
    found = table(
        "", *compared, numbers=compared, title="methods",
        caption="answers that begin with the right one; locality: first token kept",
    )  # fmt: skip
    found.add_row("rows", *(str(summary["rows"]) for summary in compared.values()))
    for aspect in aspects:
        name = "first_token_kept" if aspect.startswith("locality") else "begins"
        shown = [summary["aspects"].get(aspect, {}).get(name) for summary in compared.values()]
        found.add_row(escape(aspect), *(f"{one['edited']:.3f}" if one else "" for one in shown))
    losses = [summary["drift"].get("text_loss") for summary in compared.values()]
    found.add_row("text loss", *(f"{one['edited'] - one['unedited']:+.4f}" if one else "" for one in losses))
    seconds = [summary["median_seconds"] for summary in compared.values()]
    found.add_row("seconds an edit", *("cut off" if one is None else f"{one:.1f}" for one in seconds))
    return found


def _states(states: dict[str, float], kept: bool = False) -> tuple[str, str]:
    """A measure unedited and edited; what is kept of the unedited answers has no number before."""
    return "" if kept else f"{states['unedited']:.3f}", f"{states['edited']:.3f}"
