"""Thousands of edits, one call after the other: what holds, and what becomes of ordinary text.

    ENGRAM_DATA=... python bench/lifelong.py --method natural --output out   one method
    python bench/lifelong.py --output out --draw docs/lifelong.svg           their figure

Rows of CounterFact, in their order, in batches of 100 (ROME: one by one) into one `EditStore`. After some
numbers of edits the model is asked: of the edits so far, evenly spread (all of them at the end), how many
prompts it answers with the whole target, each token the likeliest; and the perplexity of 16 pieces of
Wikipedia text that no statistics read. A run that was cut off goes on by the same command.
`out/METHOD.json` has a row for each number of edits.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from engram_kernels._io import write_json
from engram_kernels.editing import METHODS, Edit, EditStore, load_model
from engram_kernels.editing.held_out import text_loss, wikipedia_rows
from engram_kernels.editing.reach import reached
from engram_kernels.editing.search.batching import encode_edit

STAGES = (100, 200, 400, 700, 1000, 1500, 2000)
ASKED, TEXTS = 300, 16
# The methods as they are, but that values are searched after the bare prompt alone and not after twenty
# sampled texts too, which would take six times as long and changes what is asked here little.
SEARCHED = ("rome", "memit", "alphaedit", "engram", "rlsedit", "encore")


def read_edits(file: Path, count: int) -> list[Edit]:
    """The first rows of CounterFact's file."""
    rows = json.loads(file.read_text(encoding="utf-8"))[:count]
    return [
        Edit(row["subject"], row["prompt"].replace(row["subject"], "{}", 1), row["target_new"])
        for row in rows
    ]


def holding(model, tokenizer, edits: list[Edit]) -> float:
    """The share of prompts that the model answers with the whole target."""
    rows = [encode_edit(model, tokenizer, edit, ()).rewriting[0] for edit in edits]
    return sum(one.said for one in reached(model, rows, [edit.text for edit in edits])) / len(edits)


def measure(method: str, output: Path, edits: list[Edit], stages: list[int]) -> None:
    """Make the edits, and write a row after each number of them."""
    model, tokenizer = load_model("smollm2")
    texts = wikipedia_rows(tokenizer, TEXTS)
    report = output / f"{method}.json"
    found = json.loads(report.read_text()) if report.exists() else {"method": method, "rows": []}
    if "text_loss" not in found:
        found["text_loss"] = text_loss(model, texts)
    settings = METHODS[method]
    if method == "rome":
        # A call of many, each edit found in the model as it is then.
        settings = replace(settings, batch=1)
    elif settings.batch is None:
        settings = replace(settings, batch=100)
    if settings.null_space is not None:
        # Of SmolLM2's layers no eigenvalue is under 0.13 of the mean.
        settings = replace(settings, null_space=0.3)
    contexts = () if method in SEARCHED else ((5, 10), (10, 10))
    store = EditStore(output / method, model, tokenizer, method=settings, contexts=contexts)
    for stage in stages:
        if stage > len(edits) or any(row["edits"] == stage for row in found["rows"]):
            continue
        asked = edits[sum(found.get("asked", [])) : stage]
        clock, processor = time.perf_counter(), time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = store.add(asked, conflicts="last", failures="skip")
        seconds = {"seconds": time.perf_counter() - clock, "processor": time.process_time() - processor}
        found.setdefault("asked", []).append(len(asked))
        count = stage if stage == len(edits) else min(stage, ASKED)
        sample = [edits[i * stage // count] for i in range(count)]
        row = {"edits": stage, "made": len(made), **seconds, "holding": holding(model, tokenizer, sample)}
        row["new"] = sum(one.record.took for one in made) / len(asked)
        row["perplexity"] = math.expm1(min(text_loss(model, texts) - found["text_loss"], 700.0))
        found["rows"].append(row)
        write_json(report, found)
        print(method, json.dumps(row), flush=True)


def draw(output: Path, figure: Path) -> None:
    """Success and perplexity against the number of edits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "engram"
    whole, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6), layout="constrained")
    for path in sorted(output.glob("*.json")):
        found = json.loads(path.read_text())
        counts = [row["edits"] for row in found["rows"]]
        above.plot(counts, [row["holding"] for row in found["rows"]], marker="o", label=found["method"])
        below.plot(counts, [100 * row["perplexity"] for row in found["rows"]], marker="o")
    above.axhline(0.8, color="0.7", linewidth=0.8, linestyle="--")
    above.set(ylabel="edits that hold", ylim=(0, 1.03), xscale="log")
    above.legend(frameon=False)
    below.axhline(2, color="0.7", linewidth=0.8, linestyle="--")
    # By a tenth or by a hundred times: linear up to ten per cent.
    below.set_yscale("symlog", linthresh=10)
    below.set(ylabel="rise of ordinary text's perplexity, %", xlabel="edits")
    ticks = (50, 100, 200, 500, 1000, 2000)
    below.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    below.minorticks_off()
    top = 1.5 * max(below.get_ylim()[1], 10)
    rises = [rise for rise in (0, 2, 5, 10, 30, 100, 300, 1000, 10_000, 100_000) if rise <= top]
    below.set_yticks(rises, labels=[f"{rise:,}" for rise in rises])
    below.set_ylim(0, top)
    whole.savefig(figure, metadata={"Date": None} if figure.suffix == ".svg" else None)


def main(
    output: Annotated[Path, typer.Option(help="A folder, for the stores and a JSON file a method.")],
    method: Annotated[str | None, typer.Option(help="One of the methods by name.")] = None,
    edits: Annotated[int, typer.Option(help="How many rows of the file.")] = 2000,
    draw_to: Annotated[Path | None, typer.Option("--draw", help="The figure of what is there.")] = None,
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    if method is not None:
        file = Path(os.environ.get("ENGRAM_DATA", "."), "counterfact_dev.json")
        stages = sorted({stage for stage in STAGES if stage <= edits} | {edits})
        measure(method, output, read_edits(file, edits), stages)
    if draw_to is not None:
        draw(output, draw_to)


if __name__ == "__main__":
    typer.run(main)
