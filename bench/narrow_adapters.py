"""A store's edits as adapters of smaller ranks: what is lost, and how many edits hold then.

    ENGRAM_DATA=... python bench/narrow_adapters.py --store out/natural

For a store that `lifelong.py` made. Prints a row of JSON a rank and a way of choosing it, by the answers to
the edits' keys or by the change's own singular values: the largest share of a matrix that is lost; of all
edits the share whose prompt is answered with the whole target; how much more perplexing ordinary text is than
to the unedited model.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from lifelong import TEXTS, holding, read_edits

from engram_kernels.editing import EditStore, load_model
from engram_kernels.editing.held_out import text_loss, wikipedia_rows
from engram_kernels.editing.saving.compression import compressed


def main(
    store: Annotated[Path, typer.Option(help="The store's folder.")],
    ranks: Annotated[str, typer.Option(help="Which are tried.")] = "32,64,128,256,576",
) -> None:
    result = EditStore(store).result()
    edits = read_edits(Path(os.environ.get("ENGRAM_DATA", "."), "counterfact_dev.json"), len(result))
    model, tokenizer = load_model("smollm2")
    texts = wikipedia_rows(tokenizer, TEXTS)
    before = text_loss(model, texts)
    weights = {module: model.get_submodule(module).weight for module in result.modules}
    base = {module: weight.detach().clone() for module, weight in weights.items()}
    factors = {module: result.factors(module) for module in result.modules}
    keys = {
        module: torch.cat([write.keys for write in result.writes if write.module == module])
        for module in result.modules
    }
    for rank, way in itertools.product(map(int, ranks.split(",")), ("keys", "values")):
        lost = 0.0
        for module, (left, right) in factors.items():
            own = keys[module] if way == "keys" else None
            left, right, share = compressed(left, right, rank, own)
            lost = max(lost, share)
            with torch.no_grad():
                weights[module].copy_(base[module] + left @ right)
        found = {"edits": len(result), "rank": rank, "by": way, "lost": lost}
        found["holding"] = holding(model, tokenizer, edits)
        found["perplexity"] = math.expm1(text_loss(model, texts) - before)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    typer.run(main)
