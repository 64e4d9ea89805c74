"""One edit's search in bf16 and fp32, and with parts of layers compiled: processor seconds, and what takes.

    python bench/forms_of_search.py --rows 3 --rounds 3 --steps 10
    python bench/forms_of_search.py --rows 8 --rounds 1 --forms "bf16, bf16 as float32"

The rows of `edits_that_take.py`, each edited by its prompt alone and taken back; the forms take turns. With
`--steps` all searches have as many. The first search of a form is told apart: code is compiled in it. Answers
are generated after the prompt and after wordings that no edit is told.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from statistics import fmean, median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from take_rows import read_take_rows

from engram_kernels.editing import Edit, Editor, load_model
from engram_kernels.editing.methods import METHODS
from engram_kernels.evaluation.answers import greedy, success
from engram_kernels.hf.layers import decoder_layers

# The weights' type, whether they are float32 meanwhile, whether code is compiled.
FORMS = {
    "fp32": (torch.float32, False, False),
    "fp32, compiled": (torch.float32, False, True),
    "bf16 as float32": (torch.bfloat16, True, False),
    "bf16": (torch.bfloat16, False, False),
}


def editor_of(name: str, steps: int | None) -> Editor:
    """An editor of a model of its own."""
    dtype, wide, compiled = FORMS[name]
    value = METHODS["engram"].value
    if steps is not None:
        value = replace(value, steps=steps, stop_probability=None, stop_loss=0.0)
    model, tokenizer = load_model("smollm2", dtype)
    editor = Editor(model, tokenizer, value=replace(value, widen=wide))
    layers = editor.layers("engram")
    editor.covariances(layers)
    editor.prefixes()
    for layer in decoder_layers(model)[1][layers[0] + 1 :] if compiled else ():
        # A whole layer is compiled anew for every length of the cache: ten seconds each.
        for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            part.forward = torch.compile(part.forward, dynamic=True)
    return editor


def main(
    rows: Annotated[int, typer.Option(help="The first so many.")] = 3,
    rounds: Annotated[int, typer.Option(help="Searches of each row and form.")] = 3,
    steps: Annotated[int | None, typer.Option(help="Of each search; default: as usual.")] = None,
    forms: Annotated[str, typer.Option(help="Which, with commas; default: all.")] = "",
) -> None:
    # Whatever this processor has: "bf16" is told not to widen.
    torch.cpu._is_amx_tile_supported = torch.cpu._is_avx512_bf16_supported = lambda: False
    names = [name.strip() for name in forms.split(",")] if forms else list(FORMS)
    editors = {name: editor_of(name, steps) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    said: dict[str, list[tuple[bool, float]]] = {name: [] for name in names}
    for row in read_take_rows()[:rows]:
        fact = Edit(row.subject, row.prompt, row.target)
        for turn in range(rounds):
            for name, editor in editors.items():
                began = time.process_time()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    result = editor.edit(fact)
                seconds[name].append(time.process_time() - began)
                if turn == 0:
                    asked = [row.about(text) for text in (row.prompt, *row.unseen)]
                    written = greedy(editor.model, editor.tokenizer, asked, 8)
                    begins = [success(one.text, row.target).begins for one in written]
                    said[name].append((begins[0], fmean(begins[1:])))
                result.revert()
                print(row.number, name, f"{seconds[name][-1]:.2f}", said[name][-1], flush=True)
    drawn = Table("form", "first search", "others, median", "prompt", "unseen wordings")
    for name in names:
        prompt, unseen = zip(*said[name], strict=True)
        others = f"{median(seconds[name][1:]):.2f}"
        drawn.add_row(name, f"{seconds[name][0]:.1f}", others, f"{fmean(prompt):.2f}", f"{fmean(unseen):.2f}")
    Console(width=120).print(drawn)


if __name__ == "__main__":
    typer.run(main)
