"""`engram store`: edits kept in a folder by a small random model on disk."""

import json

import pytest
from command_line import refused
from editing_helpers import small_editor
from model_zoo import TEXTS, small_model

from engram_kernels.editing import EditResult, EditStore
from engram_kernels.hf.checkpoints import save_model

pytestmark = pytest.mark.usefixtures("one_thread")

TOWER = ("--subject", "The Eiffel Tower", "--prompt", "{} is located in the city of", "--target", "Rome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    tokenizer = small_editor().tokenizer
    save_model(small_model("llama", vocabulary=len(tokenizer)), tokenizer, path / "base")
    (path / "corpus.txt").write_text("\n".join(TEXTS))
    facts = [{"subject": name, "prompt": "{} is in", "target": "Rome"} for name in ("Colosseum", "Zürich")]
    (path / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    return path


@pytest.fixture
def engram(engram, monkeypatch, folder):
    monkeypatch.chdir(folder)
    return lambda *arguments: engram("store", *arguments)


BASE = ("--model", "base", "--corpus", "corpus.txt")


def test_add_list_remove_export_verify(engram, folder):
    status, out, err = engram("add", "kept", *TOWER, *BASE)
    assert status == 0, err
    assert "The Eiffel Tower is located in the city of Rome" in out and "kept: 1 edit of base." in out
    status, out, err = engram("add", "kept", "--facts", "facts.jsonl", *BASE)
    assert status == 0 and "kept: 3 edits of base." in out, err
    status, out, _ = engram("list", "kept")
    assert status == 0 and "Zürich is in Rome" in out and "3 edits of layers 0, 1, 2." in out
    status, out, err = engram("verify", "kept", *BASE)
    assert status == 0 and "bit for bit" in out, err
    status, out, err = engram("remove", "kept", "--id", 2, *BASE)
    assert status == 0 and "kept: 2 edits of base." in out, err
    status, out, _ = engram("list", "kept")
    assert "Colosseum" not in out and "Zürich" in out
    status, out, _ = engram("verify", "kept")
    assert status == 0 and "2 edits; all can be read" in out
    status, out, err = engram("export", "kept", "--out", "adapter")
    assert status == 0 and "Saved 2 edits to adapter." in out, err
    saved = EditResult.from_pretrained(folder / "adapter")
    assert [record.edit.subject for record in saved.records] == ["The Eiffel Tower", "Zürich"]
    with saved.apply(small_model("llama", vocabulary=len(small_editor().tokenizer))) as applied:
        assert applied.applied


def test_gradients_bounds_and_ranks(engram, folder):
    """`--values`, `--stop-on` and `--rank`: a run that ends on its health keeps what came before."""
    natural = ("--method", "natural", "--layers", "0-1", *BASE)
    status, out, err = engram("add", "steps", *TOWER, *natural)
    assert status == 0 and "Health: ‖W‖ × " in out and "kept" not in out, err
    status, out, err = engram("add", "steps", "--facts", "facts.jsonl", "--stop-on", "growth=1000", *BASE)
    assert status == 0 and "steps: 3 edits of base." in out and "not made" not in out, err
    status, out, err = engram("add", "steps", *TOWER[:-1], "Paris", "--stop-on", "update=1e-9", *BASE)
    assert status == 1 and "stop_on: the run ended after 0 edits" in err
    assert len(EditStore("steps")) == 3
    status, out, err = engram("export", "steps", "--out", "narrow", "--rank", 1)
    assert status == 0 and "Saved 3 edits to narrow." in out and "% is lost" in out, err
    assert json.loads((folder / "narrow" / "adapter_config.json").read_text())["r"] == 1
    status, out, err = engram("add", "searched", *TOWER, "--values", "warm", "--method", "rome", *BASE)
    assert status == 0, err


def test_a_run_that_a_bound_ends_has_a_status_of_its_own(engram, folder):
    lines = [{"subject": name, "prompt": "{} is in", "target": "Rome"} for name in ("Ulm", "Bern", "Graz")]
    (folder / "three.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked = ("--facts", "three.jsonl", "--values", "gradient", *BASE)
    assert engram("add", "free", *asked)[0] == 0
    updates = [one.update for one in EditStore("free").health]
    bound = (max(updates[:2]) + updates[2]) / 2
    assert updates[2] > bound  # else this test shows nothing
    status, _, err = engram("add", "bounded", *asked, "--stop-on", f"update={bound}")
    assert status == 3 and "--stop-on: 1 edit not made, update" in err
    assert [one.edit.subject for one in EditStore("bounded")] == ["Ulm", "Bern"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "nowhere"), "store: expected a store"),
        (("add", "new", *BASE), "--facts: expected a file, or a subject, a prompt and a target, got neither"),
        (("add", "new", *TOWER, "--facts", "facts.jsonl", *BASE), "--facts: expected a file or one fact"),
        (("add", "new", "--facts", "corpus.txt", *BASE), "--facts: expected a fact in line 1"),
        (
            ("add", "new", "--facts", "nowhere.jsonl", *BASE),
            "--facts: expected a text file",
        ),
        (("add", "new", *TOWER, "--method", "rom", *BASE), "--method: expected one of"),
        (("list", "base"), "store: expected a store"),
        (
            ("add", "new", *TOWER, "--values", "guess", *BASE),
            "--values: expected one of 'search', 'gradient'",
        ),
        (("add", "new", *TOWER, "--stop-on", "growth", *BASE), "--stop-on: expected a name and a number"),
        (("add", "new", *TOWER, "--stop-on", "loss=1", *BASE), "--stop-on: expected names among growth"),
    ],
)
def test_bad_input(engram, folder, arguments, message):
    refused(engram(*arguments), message)
    assert not (folder / "new" / "store.json").exists()


def test_another_model_is_refused(engram, folder):
    engram("add", "mine", *TOWER, *BASE)
    save_model(
        small_model("llama", vocabulary=len(small_editor().tokenizer), seed=1),
        small_editor().tokenizer,
        folder / "other",
    )
    result = engram("remove", "mine", "--id", 1, "--model", "other", "--corpus", "corpus.txt")
    refused(result, "--model: expected the one of")
