"""The benchmark of thousands of edits on a small random model: rows, a cut, and the figure."""

import json

import lifelong
import model_zoo
import pytest

ROWS = [
    {"prompt": f"The tower of {name} is in", "subject": name, "target_new": "Rome"}
    for name in ("Ulm", "Pisa")
]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*did not take:UserWarning", "ignore:after .* edits:UserWarning"),
]


@pytest.fixture
def small(monkeypatch, tmp_path):
    def load(_name):
        return model_zoo.small_model("llama"), model_zoo.byte_level_tokenizer()

    whole = lifelong.EditStore

    def store(*arguments, **options):
        return whole(*arguments, corpus=model_zoo.TEXTS, layers=[0, 1], **{"contexts": (), **options})

    monkeypatch.setattr(lifelong, "load_model", load)
    monkeypatch.setattr(lifelong, "EditStore", store)
    monkeypatch.setattr(lifelong, "TEXTS", 1)
    (tmp_path / "rows").write_text(json.dumps(ROWS))
    return lifelong.read_edits(tmp_path / "rows", 2)


def test_rows_are_kept_and_a_cut_run_goes_on(small, tmp_path):
    assert [edit.prompt for edit in small] == ["The tower of {} is in"] * 2
    lifelong.measure("natural", tmp_path, small[:1], [1])
    first = json.loads((tmp_path / "natural.json").read_text())
    lifelong.measure("natural", tmp_path, small, [1, 2])
    found = json.loads((tmp_path / "natural.json").read_text())
    assert found["rows"][0] == first["rows"][0] and [row["edits"] for row in found["rows"]] == [1, 2]
    assert found["asked"] == [1, 1] and all(0 <= row["holding"] <= 1 for row in found["rows"])
    pytest.importorskip("matplotlib")
    lifelong.draw(tmp_path, tmp_path / "curves.svg")
    assert "natural" in (tmp_path / "curves.svg").read_text()
