"""`engram apply`: saved edits written into a small random model on disk."""

import copy
import dataclasses
import json
import shutil
import stat

import pytest
import torch
from command_line import refused
from editing_helpers import changed, small_editor, weights
from model_zoo import byte_level_tokenizer, small_model

from engram_kernels.editing import Edit, EditResult, open_expert, routed_expert
from engram_kernels.editing.search.values import ValueOptions
from engram_kernels.errors import EngramError
from engram_kernels.hf.checkpoints import save_model
from engram_kernels.hf.loading import without_progress_bars

pytestmark = pytest.mark.usefixtures("one_thread")

TOWER = Edit("The Eiffel Tower", "{} is located in the city of", "Rome")
COLOSSEUM = Edit("Colosseum", "the Colosseum is located in the city of", "Paris")
FEW = ValueOptions(steps=3, learning_rate=0.05, weight_decay=0.0)


def editor_of(model, cache):
    return small_editor(model=model, cache_dir=cache, contexts=((4, 2),), value=FEW)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, and edits of it: two of one matrix, one on top of the other, one in bfloat16."""
    path = tmp_path_factory.mktemp("apply")
    tokenizer = small_editor().tokenizer
    base = small_model("llama", vocabulary=len(tokenizer))
    for name, model in (("base", base), ("gpt2", small_model("gpt2", vocabulary=len(tokenizer)))):
        save_model(model, tokenizer, path / name)
    model = copy.deepcopy(base)
    editor = editor_of(model, path / "cache")
    with editor.edit(COLOSSEUM, layers=1) as result:
        result.save_pretrained(path / "colosseum")
    result = editor.edit(TOWER, layers=1)
    result.save_pretrained(path / "tower")
    torch.save(model.state_dict(), path / "with tower")
    result = editor.edit([COLOSSEUM, TOWER], layers=[1, 2], method="memit", ridge=0.1)
    result.save_pretrained(path / "on top")
    torch.save(model.state_dict(), path / "with both")
    editor_of(copy.deepcopy(base).bfloat16(), path / "cache").edit(TOWER, layers=1).save_pretrained(
        path / "half"
    )
    return path


@pytest.fixture
def engram(engram, monkeypatch, folder):
    monkeypatch.chdir(folder)
    return lambda *arguments: engram("apply", *arguments)


def saved(path):
    """The model of a folder, as transformers reads it; every tensor is there."""
    import transformers

    transformers.AutoTokenizer.from_pretrained(path)
    with without_progress_bars(transformers):
        model, information = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not information["missing_keys"] and not information["unexpected_keys"]
    return model


@pytest.mark.parametrize(
    ("edits", "expected"),
    [(["tower"], "with tower"), (["tower", "on top"], "with both")],
    ids=["one", "one on top of the other"],
)
def test_apply_saves_the_edited_model(engram, folder, tmp_path, edits, expected):
    flags = [word for edit in edits for word in ("--edit", edit)]
    status, out, err = engram(*flags, "--model", "base", "--out", tmp_path / "model")
    assert (status, err) == (0, "")
    assert "tower: The Eiffel Tower is located in the city of → Rome\n" in out
    assert f"Saved base with {2 * len(edits) - 1} edit" in out and "model.layers.1.mlp.down_proj" in out
    model = saved(tmp_path / "model")
    assert not changed(torch.load(folder / expected), model)
    files = list((tmp_path / "model").iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o644}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_edits_made_for_one_base_add_up(engram, folder, tmp_path):
    """Neither was made on top of the other: the sum of both changes stands on the base."""
    base = saved(folder / "base")
    status, _, err = engram(
        "--edit", "tower", "--edit", "colosseum", "--model", "base", "--out", tmp_path / "model"
    )
    assert (status, err) == (0, "")
    model, expected = saved(tmp_path / "model"), weights(base)
    for name in ("tower", "colosseum"):
        left, right = EditResult.from_pretrained(folder / name).factors("model.layers.1.mlp.down_proj")
        expected["model.layers.1.mlp.down_proj.weight"] += left @ right
    name = "model.layers.1.mlp.down_proj.weight"
    assert changed(weights(base), model) == [name]
    torch.testing.assert_close(model.state_dict()[name], expected[name], rtol=1e-6, atol=1e-7)


def test_the_model_is_saved_in_the_dtype_of_its_edit(engram, tmp_path):
    status, _, err = engram("--edit", "half", "--model", "base", "--out", tmp_path / "model")
    assert (status, err) == (0, "")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert saved(tmp_path / "model").dtype == torch.bfloat16


def test_an_edit_of_a_routed_expert(engram, tmp_path):
    editor = small_editor()
    model = small_model("qwen3_moe", vocabulary=len(editor.tokenizer))
    save_model(model, editor.tokenizer, tmp_path / "mixture")
    editor = editor_of(model, tmp_path / "cache")
    with open_expert(model, 1, routed_expert(model, editor.tokenizer, TOWER, 1)):
        editor.edit(TOWER, layers=1).save_pretrained(tmp_path / "edit")
    status, out, err = engram(
        "--edit", tmp_path / "edit", "--model", tmp_path / "mixture", "--out", tmp_path / "model"
    )
    assert (status, err) == (0, "") and "experts.down_proj." in out
    assert not changed(weights(model), saved(tmp_path / "model"))


OTHERS = "--model: expected in 'model.layers.1.mlp.down_proj' the weights that the edit was made for"
STACK = "results: expected edits made for the same weights, or one on top of the other, got number 1 made for"
BAD = {
    "missing edit": (
        ("--edit", "no/such/edit"),
        "--edit: expected a folder or a repository on the Hub, got",
    ),
    "no edit": (("--edit", "base"), "--edit: expected saved edits, got 'base'"),
    "an edit twice": (
        ("--edit", "tower", "--edit", "tower"),
        "--edit: expected different folders, got",
    ),
    "missing model": (
        ("--edit", "tower", "--model", "no/such/model"),
        "--model: expected 'smollm2', a directory",
    ),
    "another architecture": (("--edit", "tower", "--model", "gpt2"), "--model: expected a matrix"),
    "without what was below": (("--edit", "on top"), OTHERS),
    "the wrong order": (("--edit", "on top", "--edit", "tower"), STACK),
    "two dtypes": (("--edit", "tower", "--edit", "half"), STACK),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(engram, tmp_path, case):
    change, message = BAD[case]
    refused(engram("--model", "base", "--out", tmp_path / "model", *change), message)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("edits", [["on top"], ["on top", "tower"]])
def test_force_writes_on_other_weights(engram, folder, tmp_path, edits):
    base = saved(folder / "base")
    flags = [word for edit in edits for word in ("--edit", edit)]
    status, _, err = engram(*flags, "--model", "base", "--out", tmp_path / "model", "--force")
    assert (status, err) == (0, "")
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)]
    assert changed(weights(base), saved(tmp_path / "model")) == names


def test_force_does_not_join_matrices_of_two_shapes(folder):
    tower, other = (EditResult.from_pretrained(folder / "tower") for _ in range(2))
    other.writes = [dataclasses.replace(write, right=write.right[:, 1:]) for write in other.writes]
    message = r"^results: expected a matrix \[32, 64\] in 'model\.layers\.1\..*', got \[32, 63\] in number 1$"
    with pytest.raises(EngramError, match=message):
        EditResult.merge([tower, other], force=True)


def test_the_folder_is_checked_before_any_work(engram, tmp_path, monkeypatch):
    monkeypatch.setattr("engram_kernels.hf.loading.load_model", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for out, message in (
        ("full", "--out: expected a new or empty folder"),
        ("full/file", "--out: expected a new or empty folder"),
        ("a/b", "--out: expected a path in a folder that can be written"),
    ):
        refused(engram("--edit", "tower", "--model", "base", "--out", tmp_path / out), message)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


@pytest.mark.parametrize("edit", ["tower", "half"], ids=["written into files", "loaded"])
def test_a_failed_save_leaves_nothing(engram, tmp_path, monkeypatch, edit):
    import transformers

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    if edit == "half":
        monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", fail)
    else:
        monkeypatch.setattr(shutil, "copyfile", fail)
    result = engram("--edit", edit, "--model", "base", "--out", tmp_path / "model")
    assert result[0] == 1 and "No space left on device" in result[2] and not any(tmp_path.iterdir())


def test_a_model_that_wears_a_lora_is_not_saved_without_its_weights(engram, folder, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(saved(folder / "base"), lora)
    adapted.save_pretrained(tmp_path / "lora")
    small_editor().tokenizer.save_pretrained(tmp_path / "lora")
    result = engram("--edit", "tower", "--model", tmp_path / "lora", "--out", tmp_path / "model")
    refused(result, "--model: expected one without an adapter")
    assert not (tmp_path / "model").exists()


def test_a_generation_config_that_is_not_saved_is_said(tmp_path):
    model = small_model("llama")
    model.generation_config.temperature = 0.5
    message = (
        r"^model: expected a generation_config that transformers saves, got an invalid one: `temperature`"
    )
    with pytest.raises(EngramError, match=message) as caught:
        save_model(model, byte_level_tokenizer(), tmp_path / "new")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
