"""Searched, searched from where the gradient leads, or by gradients alone: seconds, and what the edit says.

    ENGRAM_DATA=... python bench/ways_to_values.py --output ways.json --rows 16

The rows of `edits_that_take.py`, each edited by its prompt alone and taken back. Prints and keeps, for each
way, medians of the seconds of one processor core and of evaluations of the loss, and the shares of generated
answers that begin with the target: after the edit's prompt, and after wordings that no edit is told. A run
that was cut off goes on by the same command.
"""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from statistics import fmean, median
from typing import Annotated

import typer
from take_rows import read_take_rows

from engram_kernels._io import write_json
from engram_kernels.editing import Edit, Editor, load_model
from engram_kernels.evaluation.answers import greedy, success

WAYS = {
    "search": {"method": "engram"},
    "warm": {"method": "engram", "values": "warm"},
    "gradient": {"method": "natural"},
}


def main(
    output: Annotated[Path, typer.Option(help="JSON file for every row.")],
    rows: Annotated[int, typer.Option(help="The first so many.")] = 16,
) -> None:
    model, tokenizer = load_model("smollm2")
    editor = Editor(model, tokenizer)
    editor.prefixes()
    for options in WAYS.values():
        editor.covariances(editor.layers(options["method"]))
    found = json.loads(output.read_text()) if output.exists() else []
    for row in read_take_rows()[:rows]:
        for way, options in WAYS.items():
            if any(one["row"] == row.number and one["way"] == way for one in found):
                continue
            began = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = editor.edit(Edit(row.subject, row.prompt, row.target), **options)
            seconds = time.process_time() - began
            asked = [row.about(text) for text in (row.prompt, *row.unseen)]
            said = [success(one.text, row.target).begins for one in greedy(model, tokenizer, asked, 8)]
            result.revert()
            one = {"row": row.number, "way": way, "seconds": seconds, "prompt": said[0], "unseen": said[1:]}
            found.append(one | {"steps": len(result.records[0].losses)})
            write_json(output, found)
    for way in WAYS:
        own = [one for one in found if one["way"] == way]
        report = {"way": way, "rows": len(own)}
        report |= {name: median(one[name] for one in own) for name in ("seconds", "steps")}
        report["prompt"] = fmean(one["prompt"] for one in own)
        report["unseen"] = fmean(said for one in own for said in one["unseen"])
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    typer.run(main)
