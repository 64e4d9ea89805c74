"""Edits and grafts written into a checkpoint's files: the bits that loading and saving gives."""

import copy
import json
import os
import signal
import time

import pytest

pytest.importorskip("transformers")

import child
import model_zoo
import torch
from defaults import DEFAULTS
from editing_helpers import changed, small_editor, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engram_kernels.editing import Edit, EditResult, edit_checkpoint
from engram_kernels.editing.search.values import ValueOptions
from engram_kernels.errors import EngramError
from engram_kernels.grafting import Graft, graft_checkpoint
from engram_kernels.hf.shards import Checkpoint, OtherLayoutError, checkpoint_folder

pytestmark = pytest.mark.usefixtures("one_thread")

EDITS = [
    Edit("The Eiffel Tower", "{} is located in the city of", "Rome"),
    Edit("Colosseum", "the Colosseum is located in the city of", "Paris"),
]
FEW = ValueOptions(steps=3, learning_rate=0.05, weight_decay=0.0)
DTYPES = {"llama": torch.bfloat16, "gpt2": torch.float32}


class Case:
    """A model in several shards, an edit of two layers and a graft, made in memory."""

    def __init__(self, folder, family):
        model = model_zoo.small_model(family, dtype=DTYPES[family])
        editor = small_editor(model=model, value=FEW, contexts=((4, 1),), cache_dir=folder / "cache")
        self.base, self.path = copy.deepcopy(model), folder / "base"
        model.save_pretrained(self.path, max_shard_size="30KB")
        editor.tokenizer.save_pretrained(self.path)
        (self.path / "pytorch_model.bin").write_bytes(b"other weights")
        self.edits = editor.edit(EDITS, layers=[1, 2], method="memit", ridge=0.1)
        self.edited = weights(model)
        self.edits.revert()
        self.graft = graft_of(model)
        with self.graft.apply(model):
            self.grafted = weights(model)


def graft_of(model):
    """Other values at some places of two matrices."""
    names = [name for name, weight in model.named_parameters() if "layers." in name or ".h." in name]
    pre = {name: model.get_parameter(name).detach() for name in names}
    masks = {name: torch.zeros(-(-weight.numel() // 8), dtype=torch.uint8) for name, weight in pre.items()}
    for name in (names[3], names[-2]):
        masks[name][::7] = 5
    return Graft.from_masks(pre, {name: weight + 1 for name, weight in pre.items()}, masks)


@pytest.fixture(scope="module", params=DTYPES)
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp(request.param), request.param)


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def loaded(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def opened(path):
    with safe_open(path, framework="pt") as file:
        return list(file.offset_keys()), file.metadata()


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("kind", ["edit", "graft"])
def test_files_are_those_of_the_model_that_is_loaded_and_saved(case, tmp_path, kind, link):
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in case.path.iterdir()}
    if kind == "edit":
        edit_checkpoint(case.edits, case.path, out, link=link)
    else:
        graft_checkpoint(case.graft, case.path, out, link=link)
    expected = case.edited if kind == "edit" else case.grafted
    model = loaded(out)
    assert changed(expected, model) == [] and changed(weights(case.base), model)
    assert {path.name: path.read_bytes() for path in case.path.iterdir()} == before
    assert {path.name for path in out.iterdir()} == before.keys() - {"pytorch_model.bin"}
    assert len(shards(out)) > 3
    linked = 0
    for path in shards(out):
        assert opened(path) == opened(case.path / path.name)
        same = path.read_bytes() == before[path.name]
        linked += path.stat().st_ino == (case.path / path.name).stat().st_ino
        assert same or path.stat().st_ino != (case.path / path.name).stat().st_ino
    assert (linked > 0) == link


def test_a_default_device_of_the_caller_does_not_matter(case, tmp_path):
    with DEFAULTS["another device"]():
        edit_checkpoint(case.edits, case.path, tmp_path / "out")
    assert changed(case.edited, loaded(tmp_path / "out")) == []


def test_a_matrix_of_another_base_is_refused_before_anything_is_written(case, tmp_path):
    other = copy.deepcopy(case.base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.save_pretrained(tmp_path / "other")
    for write, change in ((edit_checkpoint, case.edits), (graft_checkpoint, case.graft)):
        with pytest.raises(
            EngramError, match=r"^model: expected in .* weights that the (edit|graft) was made"
        ):
            write(change, tmp_path / "other", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["other"]
        write(change, tmp_path / "other", tmp_path / "out", force=True)
        (tmp_path / "out").rename(tmp_path / write.__name__)
        # A forced apply changes what the edits know of their outcome.
        with copy.deepcopy(change).apply(other, force=True):
            assert changed(weights(other), loaded(tmp_path / write.__name__)) == []
        for path in (tmp_path / write.__name__).iterdir():
            path.unlink()
        (tmp_path / write.__name__).rmdir()


@pytest.mark.parametrize(
    "layout", ["no model", "other names", "other type", "quantised", "adapter", "cut off"]
)
def test_what_must_be_loaded_is_said(case, tmp_path, layout):
    folder = tmp_path / "model"
    case.base.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if layout == "no model":
        path.unlink()
    elif layout == "other names":
        save_file({f"wrapped.{name}": tensor for name, tensor in tensors.items()}, path)
    elif layout == "other type":
        save_file({name: tensor.half() for name, tensor in tensors.items()}, path)
    elif layout == "quantised":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    elif layout == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    else:
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(OtherLayoutError, match=r"^model: expected "):
        edit_checkpoint(case.edits, folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_index_that_names_what_is_not_there_is_refused(case, tmp_path):
    for path in case.path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["no.such.tensor"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(OtherLayoutError, match=r"^model: expected 'no\.such\.tensor' in .*, got none$"):
        Checkpoint(tmp_path)


def test_an_index_beside_a_whole_file_is_left_alone(tmp_path):
    """As transformers leaves it, which takes the whole file."""
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    Checkpoint(tmp_path).rewrite(tmp_path / "new", {"w": torch.Tensor.neg_})
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["config.json", "model.safetensors"]
    assert Checkpoint(tmp_path / "new").read("w").tolist() == [-1, -1]


@pytest.mark.parametrize("place", ["../other.safetensors", "/tmp/other.safetensors", 7])
def test_an_index_that_leads_out_of_its_folder_is_refused(case, tmp_path, place):
    """Its names are the ones that are written under, too."""
    for path in case.path.iterdir():
        (tmp_path / "model" / path.name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    index = tmp_path / "model" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name, file = next(iter(content["weight_map"].items()))
    (tmp_path / "other.safetensors").write_bytes((tmp_path / "model" / file).read_bytes())
    content["weight_map"][name] = place
    index.write_text(json.dumps(content))
    kind = r"^model: expected a folder with safetensors .*index.json names .*, which is not in its folder"
    with pytest.raises(OtherLayoutError, match=kind):
        Checkpoint(tmp_path / "model").rewrite(tmp_path / "out" / "new", {})


def test_a_name_that_is_none_must_be_loaded(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        OtherLayoutError, match=r"^model: expected a folder or a name on the Hub, got 'no/such/model'$"
    ):
        checkpoint_folder("no/such/model")


def test_a_write_that_gives_other_bits_than_before_leaves_nothing(case, tmp_path):
    case.edits.save_pretrained(tmp_path / "edit")
    edits = EditResult.from_pretrained(tmp_path / "edit")
    edits.writes[0].left[0, 0] += 1
    with pytest.raises(EngramError, match=r"^model: expected .* to become what it became"):
        edit_checkpoint(edits, case.path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["edit"]


SLOW = """
import sys, time
from pathlib import Path
from engram_kernels.hf.shards import Checkpoint
base, out = map(Path, sys.argv[1:])
checkpoint = Checkpoint(base)
name = sorted(checkpoint.entries)[-1]
def wait(tensor):
    tensor.zero_()
    (out.parent / "begun").touch()
    time.sleep(600)
checkpoint.rewrite(out, {name: wait})
"""


def test_a_cut_in_the_middle_leaves_base_and_target_whole(case, tmp_path):
    before = {path.name: path.read_bytes() for path in case.path.iterdir()}
    process = child.start(SLOW, case.path, tmp_path / "out")
    try:
        while not (tmp_path / "begun").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "out").exists()
    assert {path.name: path.read_bytes() for path in case.path.iterdir()} == before
    edit_checkpoint(case.edits, case.path, tmp_path / "out")
    assert changed(case.edited, loaded(tmp_path / "out")) == []


# Memory beside what the imports take, in bytes; the first line of what the process prints.
PEAK = """
import resource, sys
from engram_kernels.editing import EditResult, edit_checkpoint
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
import engram_kernels.ops, torch
torch.ones(4, 4) @ torch.ones(4, 4)
edits = EditResult.from_pretrained(sys.argv[1])
before = peak()
edit_checkpoint(edits, sys.argv[2], sys.argv[3])
sys.stderr.write(str(peak() - before))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="memory is counted in bytes otherwise elsewhere")
def test_memory_is_under_a_third_of_the_checkpoint(tmp_path):
    model = model_zoo.small_model("llama")
    editor = small_editor(model=model, value=FEW, contexts=((4, 1),), cache_dir=tmp_path)
    with editor.edit(EDITS[0], layers=1) as result:
        result.save_pretrained(tmp_path / "edit")
    model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    # Beside the small model's tensors, what fills 200 MB and is not edited.
    ballast = {f"ballast.{number}": torch.zeros(4, 1 << 20) for number in range(12)}
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    edited = index["weight_map"]["model.layers.1.mlp.down_proj.weight"]
    tensors = load_file(tmp_path / "base" / edited)
    save_file(tensors | ballast, tmp_path / "base" / edited, {"format": "pt"})
    index["weight_map"] |= dict.fromkeys(ballast, edited)
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    size = sum(path.stat().st_size for path in shards(tmp_path / "base"))
    status, printed = child.run(PEAK, tmp_path / "edit", tmp_path / "base", tmp_path / "out")
    assert status == 0, printed
    assert int(printed.splitlines()[-1]) < size / 3
