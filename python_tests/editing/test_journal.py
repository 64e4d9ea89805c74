"""A run that is cut off goes on from its folder, to the same bits."""

import os
import signal
import time
from functools import partial

import pytest

pytest.importorskip("transformers")

import child
import model_zoo
import torch
from editing_helpers import changed, small_editor, weights
from mutations import flip

from engram_kernels.editing import Edit
from engram_kernels.editing import run as run_module
from engram_kernels.editing.search.values import ValueOptions
from engram_kernels.errors import EngramError

EDITS = [Edit(f"Tower {a}{b}", "{} is in", "Japan") for a in "ABCDEFGHIJ" for b in "abcdefghij"]
SETTINGS = {"contexts": ((4, 1),), "value": ValueOptions(steps=3, learning_rate=0.02, batch=4)}


@pytest.fixture
def make(tmp_path):
    return partial(small_editor, cache_dir=tmp_path / "cache", **SETTINGS)


METHODS = {
    "rome": {"method": "rome", "preserve": True},
    "emmet": {"method": "emmet", "batch": 4},
    "memit": {"method": "memit", "layers": [0, 1], "ridge": 0.2, "batch": 6, "preserve": True},
}


class Cut(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_a_cut_run_goes_on_to_the_same_bits(make, tmp_path, monkeypatch, name, after):
    whole = make()
    expected = whole.edit(EDITS[:12], **METHODS[name])
    find = run_module.find_values
    calls = []

    def cut(*arguments):
        calls.append(1)
        if len(calls) > after:
            raise Cut
        return find(*arguments)

    editor = make()
    before = weights(editor.model)
    monkeypatch.setattr(run_module, "find_values", cut)
    with pytest.raises(Cut):
        editor.edit(EDITS[:12], **METHODS[name], directory=tmp_path / "run")
    assert not changed(before, editor.model)
    calls.clear()
    monkeypatch.setattr(run_module, "find_values", lambda *arguments: calls.append(1) or find(*arguments))
    result = editor.edit(EDITS[:12], **METHODS[name], directory=tmp_path / "run")
    assert not changed(weights(whole.model), editor.model)
    assert result.records == expected.records
    done = len(calls)
    result.revert()
    assert not changed(before, editor.model)

    # Once more: nothing is left to find, and the same comes of it.
    again = editor.edit(EDITS[:12], **METHODS[name], directory=tmp_path / "run")
    assert len(calls) == done and not changed(weights(whole.model), editor.model)
    assert again.records == expected.records


def test_another_run_is_refused(make, tmp_path):
    editor = make()
    editor.edit(EDITS[:3], directory=tmp_path / "run").revert()
    before = weights(editor.model)
    for word, arguments in {
        "edits": {"edits": EDITS[1:4]},
        "ridge": {"edits": EDITS[:3], "ridge": 0.5},
        "layers": {"edits": EDITS[:3], "layers": 2},
        "batch": {"edits": EDITS[:3], "batch": 3},
    }.items():
        with pytest.raises(
            EngramError, match=rf"^directory: expected one of a run with the same {word}, got"
        ) as caught:
            editor.edit(**arguments, directory=tmp_path / "run")
        assert str(caught.value).endswith(f"without it this run begins anew: rm -r {tmp_path / 'run'}")
    other = make(model=model_zoo.small_model(seed=1))
    with pytest.raises(
        EngramError, match=r"^directory: expected one of a run with the same (prefixes|model)"
    ):
        other.edit(EDITS[:3], directory=tmp_path / "run")
    with pytest.raises(EngramError, match=r"^directory: expected one of a run with the same prefixes"):
        make(seed=3).edit(EDITS[:3], directory=tmp_path / "run")
    assert not changed(before, editor.model)


def test_bad_directories(make, tmp_path):
    (tmp_path / "file").write_text("text")
    editor = make()
    before = weights(editor.model)
    with pytest.raises(EngramError, match=r"^directory: expected a directory that can be written, got "):
        editor.edit(EDITS[0], directory=tmp_path / "file")
    (tmp_path / "run").mkdir()
    for text in ("{", "[]"):
        (tmp_path / "run" / "run.json").write_text(text)
        with pytest.raises(EngramError, match=r"^directory: expected a run's run.json, got "):
            editor.edit(EDITS[0], directory=tmp_path / "run")
    with pytest.raises(TypeError, match=r"^directory: expected a path or None, got int$"):
        editor.edit(EDITS[0], directory=5)
    # What a run left that was ended before it had a run.json is nobody's.
    (tmp_path / "begun" / ".x1y2z3").mkdir(parents=True)
    (tmp_path / "begun" / ".x1y2z3" / "run.json").write_text("{")
    editor.edit(EDITS[:2], directory=tmp_path / "begun").revert()
    # Values of unknown origin are not taken for this run's.
    editor.edit(EDITS[:2], directory=tmp_path / "other").revert()
    (tmp_path / "other" / "run.json").unlink()
    with pytest.raises(EngramError, match=r"^directory: expected an empty one or a run's, got .*no run.json"):
        editor.edit(EDITS[:2], directory=tmp_path / "other")
    assert not changed(before, editor.model)


def test_spoilt_files_are_made_again(make, tmp_path):
    whole, editor = make(), make()
    whole.edit(EDITS[:10], method="emmet", batch=5)
    editor.edit(EDITS[:10], method="emmet", batch=5, directory=tmp_path / "run").revert()
    for path in sorted((tmp_path / "run").glob("*/*00000[0-3].safetensors")):
        flip(path, -1) if path.stem.endswith("0") else path.write_bytes(path.read_bytes()[:50])
    with pytest.warns(UserWarning, match="cannot be used, and is made again"):
        editor.edit(EDITS[:10], method="emmet", batch=5, directory=tmp_path / "run")
    assert not changed(weights(whole.model), editor.model)


SCRIPT = """
import sys
import torch
import model_zoo
from engram_kernels.editing import Edit, Editor, ValueOptions

cache, run, out = sys.argv[1:]
torch.set_num_threads(1)
edits = [Edit(f"Tower {a}{b}", "{} is in", "Japan") for a in "ABCDEFGHIJ" for b in "abcdefghij"]
model = model_zoo.small_model()
editor = Editor(
    model, model_zoo.byte_level_tokenizer(), corpus=model_zoo.TEXTS, cache_dir=cache, contexts=((4, 1),),
    ridge=0.01, value=ValueOptions(steps=3, learning_rate=0.02),
)
editor.edit(edits, batch=1, preserve=True, directory=run)
torch.save(model.state_dict(), out)
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_a_hundred_edits(tmp_path):
    """kill -9 of the process, in the middle; the same command then ends as if nothing had happened."""
    cache = tmp_path / "cache"
    assert child.run(SCRIPT, cache, tmp_path / "whole", tmp_path / "whole.pt")[0] == 0
    cut = cache, tmp_path / "cut", tmp_path / "cut.pt"
    process = child.start(SCRIPT, *cut)
    values = tmp_path / "cut" / "values"
    while process.poll() is None and len(list(values.glob("*.safetensors"))) < 30:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut.pt").exists() and 30 <= len(list(values.glob("*.safetensors"))) < 100
    assert child.run(SCRIPT, *cut)[0] == 0
    whole, cut = torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "cut.pt")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
