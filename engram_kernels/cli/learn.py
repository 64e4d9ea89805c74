"""`engram graft localize` and `engram graft curve`: learn grafts, and show what they keep."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..hf.swapped_weights import swapped_weights
from .common import (
    DTYPES,
    Device,
    Dtype,
    Seed,
    bars,
    check_file,
    check_folder,
    check_picture,
    device_of,
    write_json,
)
from .examples import Examples
from .output import emit, note, show, table
from .trial import Trial

Base = Annotated[str, typer.Option(help="The pre-trained model: a Hugging Face name, a folder, or smollm2.")]
Tuned = Annotated[str, typer.Option(help="The fine-tuned model, of the same architecture: a folder or name.")]
Data = Annotated[
    Path, typer.Option(help="Text to learn from: 'label text' a line with --word, else a document a line.")
]
Template = Annotated[str | None, typer.Option(help="The prompt, with {} for the text.")]
Word = Annotated[
    list[str] | None, typer.Option(help="The word that answers for label 0, 1, …; repeated, one token each.")
]
Shots = Annotated[int | None, typer.Option(help="Rows of each label to learn from; default: all.")]
RecipeName = Annotated[str, typer.Option(help="rounds, largest, panigrahi or localize-and-stitch.")]
Steps = Annotated[int | None, typer.Option(help="Gradient steps; default: the recipe's.")]
Rate = Annotated[float | None, typer.Option(help="Learning rate of the mask; default: the recipe's.")]
Lasso = Annotated[float | None, typer.Option(help="Weight of the sum of all gates; default: the recipe's.")]
Include = Annotated[
    list[str] | None, typer.Option(help="Parameters to graft, such as '*.mlp.*'; default: all layers.")
]
Exclude = Annotated[list[str] | None, typer.Option(help="Parameters to leave out; may be repeated.")]
BatchSize = Annotated[int, typer.Option(help="Rows a batch.")]
Accumulate = Annotated[int | None, typer.Option(help="Batches a step; default: the recipe's.")]
MaxLength = Annotated[int, typer.Option(help="Tokens of a text; longer ones lose their end.")]


def localize(
    base: Base,
    tuned: Tuned,
    data: Data,
    out: Annotated[Path, typer.Option(help="New folder for the graft.")],
    template: Template = None,
    word: Word = None,
    sparsity: Annotated[float, typer.Option(help="Share of the weights to graft; 1e-4 is 0.01 %.")] = 1e-4,
    recipe: RecipeName = "rounds",
    steps: Steps = None,
    lr: Rate = None,
    l1: Lasso = None,
    include: Include = None,
    exclude: Exclude = None,
    batch_size: BatchSize = 16,
    accumulate: Accumulate = None,
    refit: Annotated[
        int | None, typer.Option(help="Steps of Adam on the values at the positions that were found.")
    ] = None,
    max_length: MaxLength = 256,
    shots: Shots = None,
    test: Annotated[Path | None, typer.Option(help="Rows to count right answers on, as in --data.")] = None,
    heat_map: Annotated[Path | None, typer.Option(help="PNG file: where the graft lies.")] = None,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Find the few fine-tuned weights that carry a skill.

    Example: engram graft localize --base smollm2 --tuned my-model --data train.txt --out my-skill
    --template "Review: {} Sentiment: It was" --word " terrible" --word " great" --test test.txt
    """
    check_folder("out", out)
    check_picture("heat_map", heat_map)
    if refit is not None and refit < 1:
        raise ValueError(f"refit: expected at least 1, got {refit}")
    examples = Examples.read(data, test, template, word, shots, seed)
    options = {"recipe": recipe, "steps": steps, "lr": lr, "l1": l1, "accumulate": accumulate}
    choice = {"include": include, "exclude": exclude or ()}
    results = {}
    with bars() as progress:
        trial = Trial(base, tuned, examples, DTYPES[dtype], device_of(device), batch_size, max_length, seed)
        trial.check_sizes([sparsity], **choice)
        graft = trial.learned(sparsity, progress, **options, **choice)
        if refit is not None:
            graft = trial.refitted(graft, refit, progress)
        try:
            if test:
                results = _ends(trial, progress)
                with graft.apply(trial.model):
                    results["grafted"] = trial.test("grafted", progress)
                asked = {"test": test.name, "template": template, "words": word}
                graft.metrics |= asked | {name: result._asdict() for name, result in results.items()}
        finally:
            graft.save_pretrained(out)  # what was learned outlives a test that failed
    if results:
        scores = _table("model")
        for name, result in results.items():
            scores.add_row(name, *_cells(result))
        show(scores)
    if outside := graft.metrics.get("changed_outside"):
        from ..grafting.tuned import listed

        note(f"The fine-tuned model also changed {listed(outside)}, which stay as the base has them.")
    note(f"Saved {graft.size:,} weights to {out}.")
    scored = {name: result._asdict() for name, result in results.items()}
    emit({"out": out, "weights": graft.size, "changed_outside": outside or [], "scores": scored})
    if heat_map is not None:
        from ..grafting import plots

        plots.heat_map(graft, heat_map)


def curve(
    base: Base,
    tuned: Tuned,
    data: Data,
    test: Annotated[Path, typer.Option(help="Rows to count right answers on, as in --data.")],
    template: Annotated[str, typer.Option(help="The prompt, with {} for the text.")],
    word: Annotated[
        list[str], typer.Option(help="The word that answers for label 0, 1, …; repeated, one token each.")
    ],
    out: Annotated[Path, typer.Option(help="PNG file for the curve.")],
    report: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option(help="May be repeated; default: 1e-2, 1e-3, 1e-4, 1e-5.")
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines", help="Also graft the largest changes, and random weights, of the same number."
        ),
    ] = False,
    recipe: RecipeName = "rounds",
    steps: Steps = None,
    lr: Rate = None,
    l1: Lasso = None,
    include: Include = None,
    exclude: Exclude = None,
    batch_size: BatchSize = 16,
    accumulate: Accumulate = None,
    max_length: MaxLength = 256,
    shots: Shots = None,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Draw accuracy and calibration error against a graft's size."""
    check_picture("out", out)
    check_file("report", report)
    examples = Examples.read(data, test, template, word, shots, seed)
    options = {"recipe": recipe, "steps": steps, "lr": lr, "l1": l1, "accumulate": accumulate}
    choice = {"include": include, "exclude": exclude or ()}
    sizes = sorted(set(sparsity or (1e-2, 1e-3, 1e-4, 1e-5)), reverse=True)
    results = []
    with bars() as progress:
        trial = Trial(base, tuned, examples, DTYPES[dtype], device_of(device), batch_size, max_length, seed)
        trial.check_sizes(sizes, **choice)
        for size in sizes:
            for name in ("learned", "largest changes", "random") if baselines else ("learned",):
                stage = f"{name} {size:g}"
                if name == "learned":
                    graft = trial.learned(size, progress, stage, **options, **choice)
                else:
                    graft = trial.chosen(size, name, **choice)
                with graft.apply(trial.model):
                    results.append((name, size, graft.size, trial.test(stage, progress)))
        ends = _ends(trial, progress)
    from ..grafting import plots

    scores = _table("graft", "sparsity", "weights")
    for name, result in ends.items():
        scores.add_row(name, "", "", *_cells(result))
    for name, size, entries, result in results:
        scores.add_row(name, plots.percent(size), f"{entries:,}", *_cells(result))
    show(scores)
    lines = [(name, None, result) for name, result in ends.items()]
    points = lines + [(name, size, result) for name, size, _, result in results]
    plots.curve([plots.Point(name, size, r.accuracy, r.ece) for name, size, r in points], out)
    asked: dict[str, object] = {"base": base, "tuned": tuned, "data": str(data), "test": str(test)}
    asked |= {"shots": shots, "template": template, "words": word, "seed": seed, "dtype": dtype}
    found = {name: result._asdict() for name, result in ends.items()}
    found["grafts"] = [
        {"series": name, "sparsity": size, "entries": entries, **result._asdict()}
        for name, size, entries, result in results
    ]
    document = asked | options | choice | found
    emit(document)
    if report is not None:
        write_json(report, document)


def _ends(trial: Trial, progress) -> dict:
    """Test the base and the fine-tuned model, between which a graft lies."""
    results = {"pre": trial.test("pre", progress)}
    with swapped_weights(trial.model, trial.tuned):
        results["fine-tuned"] = trial.test("fine-tuned", progress)
    return results


def _table(*first: str) -> Table:
    numbers = ("accuracy", "ECE", "loss", "rows")
    return table(*first, *numbers, numbers=(*first[1:], *numbers))


def _cells(result) -> tuple[str, ...]:
    return f"{result.accuracy:.4f}", f"{result.ece:.4f}", f"{result.loss:.4f}", f"{result.rows:,}"
