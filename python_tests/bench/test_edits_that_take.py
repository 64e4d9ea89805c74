"""The rows on which edits are asked in other words, and what is read off the answers."""

import json
from dataclasses import replace

import edits_that_take
import pytest
import torch
from model_zoo import small_model
from safetensors.torch import save_file
from take_rows import ROWS, TakeRow, read_take_rows

RELATIONS = json.loads(ROWS.read_text(encoding="utf-8"))["relations"]
SINGLE = ("given_question", "question", "given_chat", "chat")


def test_wordings_that_are_given_are_not_asked():
    assert sum(len(relation["rows"]) for relation in RELATIONS) >= 40
    for relation in RELATIONS:
        texts = [*relation["given"], *relation["unseen"], *(relation[name] for name in SINGLE)]
        assert len(texts) == len(set(texts)) and all(text.count("{}") == 1 for text in texts)
        assert len(relation["given"]) == 3 and len(relation["unseen"]) >= 3
        assert all(len(set(row["neighbours"]) - {row["row"]}) == 11 for row in relation["rows"])


def data_of(tmp_path, **changes):
    """A file in which every row that is asked for stands, with the digests left out of the list of rows."""
    case = {
        "prompt": "Ada speaks", "subject": "Ada", "target_new": "French", "ground_truth": "English",
        "locality_prompt": "Eve speaks",
    }  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps([case | changes, {**case, "prompt": "Eva speaks"}]))
    relation = {**RELATIONS[0], "rows": []}
    row = {"row": 0, "sha256": "0e070a", "subject": "Ada", "target": "French", "neighbours": [1]}
    (tmp_path / "rows.json").write_text(
        json.dumps({"data": "data.json", "relations": [{**relation, "rows": [row]}]})
    )
    return tmp_path / "rows.json", tmp_path / "data.json"


def test_a_row_that_changed_is_refused(tmp_path):
    (row,) = read_take_rows(*data_of(tmp_path))
    assert row.prompt == "{} speaks" and row.neighbours == ("Eve speaks", "Eva speaks")
    assert row.elsewhere == ("{} speaks",) * 4  # of this file's one relation
    assert row.about(row.question) == "Q: What is the mother tongue of Ada?\nA:"
    with pytest.raises(ValueError, match="data: expected the row 0 of Ada, got another text"):
        read_take_rows(*data_of(tmp_path, ground_truth="Latin"))


def test_an_edit_of_a_file_is_added_and_taken_away(tmp_path):
    model = small_model("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    before = model.get_parameter(name).detach().clone()
    left, right = torch.randn(before.shape[0], 2), torch.randn(2, before.shape[1])
    parts = {f"{name}.left": left, f"{name}.right": right}
    save_file(parts, tmp_path / "edit.safetensors", {"seconds": "2.5"})
    with edits_that_take.edited(model, tmp_path / "edit.safetensors") as facts:
        assert torch.equal(model.get_parameter(name), before + left @ right)
        assert facts["seconds"] == 2.5
        assert facts["size"] == pytest.approx(float((left @ right).norm() / before.norm()))
    assert torch.equal(model.get_parameter(name), before)


def test_the_shares_of_a_method(tmp_path):
    row = TakeRow(
        3,
        "x",
        "Ada",
        "{} speaks",
        "French",
        "English",
        ("a {}",),
        ("b {}", "c {}"),
        "q {}",
        "r {}",
        "s {}",
        "t {}",
        ("n",),
    )
    entry = {"neighbours": [1, 2], "text_loss": 2.0}
    texts = [
        ("prompt", " French."),
        ("elsewhere", " x"),
        ("unseen", " Frenchmen"),
        ("unseen", " some French"),
        ("question", ""),
    ]
    answers = [{"form": form, "prompt": "", "text": text} for form, text in texts]
    for method, kept, loss in (("unedited", [1, 2], 2.0), ("mine", [1, 3], 2.25)):
        (tmp_path / method).mkdir()
        content = entry | {"answers": answers, "neighbours": kept, "text_loss": loss}
        (tmp_path / method / "3.json").write_text(json.dumps(content))
    everything = edits_that_take.summary(tmp_path, [row])
    assert set(everything) == {"mine", "unedited"}  # the truth is not what it says unedited
    found = everything["mine"]
    assert found["prompt"] == {"begins": 1, "contains": 1, "exact": 1}
    assert found["unseen"] == {"begins": 0, "contains": 0.5, "exact": 0}
    assert found["elsewhere"]["contains"] == found["question"]["begins"] == 0 and "chat" not in found
    assert found["neighbours_kept"] == 0.5 and found["text_loss"] == 0.25 and found["rows"] == 1
    known = edits_that_take.summary(tmp_path, [replace(row, truth="French")])[edits_that_take.OWN]
    assert known["rows"] == 1 and known["unseen"] == found["unseen"] and known["prompt"]["begins"] == 1
    drawn = edits_that_take.table({"mine": found, "own": known}, "title")
    assert drawn.row_count == 2
