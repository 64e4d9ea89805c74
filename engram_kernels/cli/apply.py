"""`engram apply`: saved edits, written into a model."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.markup import escape

from .common import Link, Model, Report, bars, check_folder, reading
from .output import emit, note

if TYPE_CHECKING:
    from ..editing import EditResult


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
    link: Link = False,
) -> None:
    """Write saved edits into their model, and save the model.

    The model's files are copied and the edited matrices written into them, one at a time: a model larger than
    the memory will do. Where its files do not hold the tensors that are edited, it is loaded.

    Example: engram apply --edit tower-in-rome --model smollm2 --out smollm2-in-rome
    """
    from ..editing import EditResult, edit_checkpoint
    from ..hf.shards import OtherLayoutError

    check_folder("out", out)
    if len(set(edit)) < len(edit):
        raise ValueError(f"edit: expected different folders, got {', '.join(edit)}")
    with reading("edit"):
        results = [EditResult.from_pretrained(folder) for folder in edit]
    edits = EditResult.merge(results, force)
    with bars() as progress:
        progress("apply", 0, 3, f"write into the files of {escape(model)}")
        try:
            edit_checkpoint(edits, model, out, force=force, link=link)
        except OtherLayoutError:
            _load_and_save(edits, model, out, force, progress)
        progress("apply", 3, 3)
    for folder, result in zip(edit, results, strict=True):
        first = result.records[0].edit
        more = f" and {len(result) - 1:,} more" if len(result) > 1 else ""
        note(f"{folder}: {first.prompt_text} → {first.target}{more}")
    count = f"{len(edits):,} edit" + "s" * (len(edits) > 1)
    where = ", ".join(edits.modules)
    note(f"Saved {model} with {count} of {where} to {out}.")
    texts = [record.edit.text for record in edits.records]
    emit({"out": out, "model": model, "edits": texts, "modules": edits.modules})


def _load_and_save(edits: "EditResult", model: str, out: Path, force: bool, progress: Report) -> None:
    """The same in memory, of a model whose files are laid out otherwise."""
    from ..editing import open_expert
    from ..hf.checkpoints import save_model
    from ..hf.loading import load_model

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
