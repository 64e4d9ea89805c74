"""Every kind of folder that is kept, with one thing changed: it is refused, or it holds the same to the bit.

ENGRAM_MUTATIONS=2000 tries ten thousand changes, a fifth of them on each kind.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("transformers")

import model_zoo
import torch
from editing_helpers import changed, small_editor, weights
from grafting_helpers import some_graft, tuned
from memory_helpers import frozen, mixed
from mutations import COUNT, mutations

from engram_kernels import EngramError
from engram_kernels.editing import Edit, EditResult, EditStore
from engram_kernels.editing.search.values import ValueOptions
from engram_kernels.grafting import DeltaReader, DeltaWriter, Graft
from engram_kernels.memory import EpisodicMemory

pytestmark = pytest.mark.usefixtures("one_thread")

EDITS = [Edit(f"Tower {letter}", "{} is located in the city of", "Rome") for letter in "abcdef"]
OPTIONS = {"contexts": ((4, 2),), "value": ValueOptions(steps=3, learning_rate=0.05, weight_decay=0.0)}


class Kind(NamedTuple):
    """`write(folder, number)` one of two contents; `read(folder)` all of it; how a refusal begins."""

    write: Callable[[Path, int], object]
    read: Callable[[Path], object]
    refusal: str


def write_edits(folder, number):
    editor = small_editor(cache_dir=folder.parent / "cache", **OPTIONS)
    with editor.edit(EDITS[3 * number :][:3], method="memit", layers=[1, 2], ridge=0.1) as result:
        result.save_pretrained(folder)


def write_store(folder, number):
    options = {**OPTIONS, "corpus": model_zoo.TEXTS, "ridge": 0.01}
    model, tokenizer = model_zoo.small_model(), model_zoo.byte_level_tokenizer()
    with EditStore(folder, model, tokenizer, **options) as store:
        for edit in EDITS[3 * number :][:2]:
            store.add(edit)


def read_store(folder):
    store = EditStore(folder)
    store.verify()
    return store.method, store.layers, [(stored.id, stored.edit) for stored in store], store.result()


def write_graft(folder, number):
    recipe, metrics = {"name": "x"}, {"accuracy": 0.5}
    graft = some_graft(model_zoo.small_model(), seed=number, recipe=recipe, metrics=metrics)
    graft.save_pretrained(folder)


def write_deltas(folder, number):
    model = model_zoo.small_model()
    writer = DeltaWriter(folder, model)
    for step in range(4):
        model = tuned(model, seed=10 * number + step, scale=1e-3)
        writer.write(model)


def read_deltas(folder):
    """The weights after each delta. Until its JSON file is there the last delta is not written."""
    base = model_zoo.small_model()
    reader, states = DeltaReader(folder, base), []
    for number in range(1, 5):
        before = weights(base)
        try:
            reached = reader.pull(number)
        except EngramError:
            assert not changed(before, base)
            raise
        if reached < number:
            raise EngramError("folder: a delta is not there yet")
        states.append(weights(base))
    return states


def write_memory(folder, number):
    memory = mixed()
    memory.forget(ids=[1 + number])
    memory.save_pretrained(folder)


def read_memory(folder):
    memory = EpisodicMemory.from_pretrained(folder)
    return frozen(memory), memory.settings, memory.m0


KINDS = {
    "edit": Kind(write_edits, EditResult.from_pretrained, "name_or_directory: expected saved edits"),
    "store": Kind(write_store, read_store, ""),
    "graft": Kind(write_graft, Graft.from_pretrained, "name_or_directory: expected a saved graft"),
    "deltas": Kind(write_deltas, read_deltas, ""),
    "memory": Kind(write_memory, read_memory, "directory: expected a saved memory"),
}


def plain(content):
    """Something that == compares to the bit."""
    if isinstance(content, torch.Tensor):
        return content.dtype, tuple(content.shape), content.contiguous().view(-1).view(torch.uint8).tolist()
    if dataclasses.is_dataclass(content):
        return {field.name: plain(getattr(content, field.name)) for field in dataclasses.fields(content)}
    if isinstance(content, EditResult):
        return plain({name: value for name, value in vars(content).items() if name != "applied"})
    if isinstance(content, Mapping):
        return [(key, plain(value)) for key, value in content.items()]
    if isinstance(content, (list, tuple)):
        return [plain(value) for value in content]
    return content


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*did not take:UserWarning")
def test_what_was_changed_is_refused_or_is_the_same(tmp_path, kind):
    kind = KINDS[kind]
    for number, name in enumerate(("folder", "other")):
        kind.write(tmp_path / name, number)
    expected = plain(kind.read(tmp_path / "folder"))
    assert expected == plain(kind.read(tmp_path / "folder")) != plain(kind.read(tmp_path / "other"))
    refused = 0
    for change in mutations(tmp_path / "folder", tmp_path / "other"):
        try:
            found = kind.read(tmp_path / "folder")
        except EngramError as error:
            assert str(error).startswith(kind.refusal) and "\n" not in str(error), (change, error)
            refused += 1
        else:
            assert plain(found) == expected, change
    assert refused > 0.8 * COUNT
