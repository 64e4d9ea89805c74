"""What two ranks do together, case after case; run as a program it is one of the ranks."""

from __future__ import annotations

import copy
import json
import sys
import traceback
from datetime import timedelta
from functools import cache
from pathlib import Path

import model_zoo
import pytest
import torch
import torch.distributed as dist
from editing_helpers import changed, small_editor, weights

from engram_kernels.editing import Edit, EditResult
from engram_kernels.editing.values import ValueOptions
from engram_kernels.errors import EngramError
from engram_kernels.hf.checkpoints import save_model
from engram_kernels.hf.loading import load_model

CASES = []
EDIT = Edit("The Eiffel Tower", "{} is located in the city of", "Rome")
FEW = ValueOptions(steps=3, learning_rate=0.05, weight_decay=0.0)


def case(function):
    CASES.append(function)
    return function


@cache
def model():
    return model_zoo.small_model("llama")


@cache
def edited(folder):
    """An edit of that model, not applied, and the weights that it makes."""
    own = copy.deepcopy(model())
    editor = small_editor(
        model=own, value=FEW, contexts=((4, 1),), cache_dir=folder / f"cache {dist.get_rank()}"
    )
    result = editor.edit(EDIT, layers=1)
    made = weights(own)
    result.revert()
    return result, made


def same_everywhere(text: str) -> bool:
    texts = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return len(set(texts)) == 1


@case
def two_ranks_save_one_folder(folder):
    save_model(model(), model_zoo.byte_level_tokenizer(), folder / "one")
    loaded, _ = load_model(folder / "one")
    assert not changed(weights(model()), loaded)


@case
def a_rank_saves_alone(folder):
    if dist.get_rank() == 1:
        save_model(model(), model_zoo.byte_level_tokenizer(), folder / "alone")
        loaded, _ = load_model(folder / "alone")
        assert not changed(weights(model()), loaded)


@case
def an_edit_is_saved_once(folder):
    result, made = edited(folder)
    result.save_pretrained(folder / "edit")
    loaded = copy.deepcopy(model())
    EditResult.from_pretrained(folder / "edit").apply(loaded)
    assert not changed(made, loaded)


@case
def a_folder_that_is_full_is_refused_everywhere(folder):
    with pytest.raises(EngramError, match=r"^directory: expected a new or empty one, got "):
        edited(folder)[0].save_pretrained(folder / "one")
    loaded, _ = load_model(folder / "one")
    assert not changed(weights(model()), loaded)


@case
def replicas_are_edited_by_the_saved_edit_and_not_by_a_search(folder):
    result, made = edited(folder)
    wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model()))
    with pytest.raises(EngramError, match=r"^model: .*DistributedDataParallel.*give model\.module"):
        small_editor(model=wrapped)
    with result.apply(wrapped):
        assert not changed(made, wrapped.module)
    assert not changed(weights(model()), wrapped.module)


def main(folder: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder / 'ranks'}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for one in CASES:
        try:
            one(folder)
            outcome = ""
        except BaseException:
            outcome = traceback.format_exc()
        (folder / f"{one.__name__} {rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
