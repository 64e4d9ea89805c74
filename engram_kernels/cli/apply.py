"""`engram apply`: saved edits, written into a model."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape

from .common import Model, bars, check_folder, console, reading


def apply(
    edit: Annotated[
        list[str],
        typer.Option(help="Folder of a saved edit; may be repeated, in the order in which they are written."),
    ],
    out: Annotated[Path, typer.Option(help="New folder for the edited model and its tokenizer.")],
    model: Model = "smollm2",
    force: Annotated[
        bool, typer.Option("--force", help="Edit even if the model's weights are others.")
    ] = False,
) -> None:
    """Write saved edits into their model, and save the model.

    Example: engram apply --edit tower-in-rome --model smollm2 --out smollm2-in-rome
    """
    from ..editing import EditResult, open_expert
    from ..hf.checkpoints import save_model
    from ..hf.loading import load_model

    check_folder("out", out)
    if len(set(edit)) < len(edit):
        raise ValueError(f"edit: expected different folders, got {', '.join(edit)}")
    with reading("edit"):
        results = [EditResult.from_pretrained(folder) for folder in edit]
    edits = EditResult.merge(results, force)
    with bars() as progress:
        progress("apply", 0, 3, f"load {escape(model)}")
        # The checksums are of weights in the dtype that the edits were made in.
        with reading("model"):
            network, tokenizer = load_model(model, dtype=getattr(torch, edits.edited_modules[0].dtype))
        progress("apply", 1, 3, "write")
        with ExitStack() as opened:
            for edited in edits.edited_modules:
                if edited.experts is not None:
                    number = int(edited.module.rpartition(".")[2])
                    opened.enter_context(open_expert(network, edited.layer, number))
            edits.apply(network, force)
        progress("apply", 2, 3, "save")
        save_model(network, tokenizer, out)
        progress("apply", 3, 3)
    for folder, result in zip(edit, results, strict=True):
        first = result.records[0].edit
        more = f" and {len(result) - 1:,} more" if len(result) > 1 else ""
        console.print(f"{folder}: {first.prompt_text} → {first.target}{more}", markup=False, highlight=False)
    count = f"{len(edits):,} edit" + "s" * (len(edits) > 1)
    where = ", ".join(edits.modules)
    console.print(f"Saved {model} with {count} of {where} to {out}.", markup=False, highlight=False)
