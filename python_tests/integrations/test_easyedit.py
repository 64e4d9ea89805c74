"""EasyEdit's methods behind the face of an editor: they edit, are measured, and leave nothing behind."""

import sys

import pytest

pytest.importorskip("transformers")

import checkouts
from evaluation_helpers import EASY_EDIT, checksums, written
from model_zoo import TEXTS, byte_level_tokenizer, small_model

from engram_kernels import EngramError
from engram_kernels.editing import Editor
from engram_kernels.evaluation import Evaluation
from engram_kernels.integrations.easyedit import EasyEdit

pytestmark = pytest.mark.usefixtures("one_thread")
needs_easyedit = pytest.mark.skipif(
    checkouts.location("easyeditor") is None, reason="ENGRAM_EASYEDIT names no checkout of EasyEdit"
)


@pytest.fixture
def editor(tmp_path):
    tokenizer = byte_level_tokenizer()
    model = small_model("llama", len(tokenizer))
    return Editor(model, tokenizer, corpus=TEXTS * 4, cache_dir=tmp_path / "cache", contexts=((3, 6),))


@pytest.fixture
def case(tmp_path):
    (found,) = written(tmp_path / "rows.json", [EASY_EDIT])
    return found


@needs_easyedit
@pytest.mark.parametrize("method", ["rome", "memit", "ft-l", "grace"])
def test_a_method_edits_is_measured_and_is_gone(editor, case, method):
    before, flags = checksums(editor.model), [p.requires_grad for p in editor.model.parameters()]
    modules = [type(module) for module in editor.model.modules()]
    pad, side = editor.tokenizer.pad_token, editor.tokenizer.padding_side
    editor.covariances(editor.layers("memit"))
    with checkouts.checkout("easyeditor"):
        baseline = EasyEdit(method, editor)
        assert repr(baseline) == f"EasyEdit({method!r}, LlamaForCausalLM)"
        result = baseline.edit([case.edit], failures="skip")
        assert [record.edit for record in result.records] == [case.edit]
        changed = checksums(editor.model) != before
        assert changed or [type(module) for module in editor.model.modules()] != modules
        result.revert()
        (outcome,) = Evaluation(baseline, fluency_tokens=0).each([case])
    assert outcome.reverted_exactly and checksums(editor.model) == before
    assert outcome.probability is None and outcome.seconds > 0
    # What was trained is likelier after the edit than before, to the harness as to EasyEdit.
    (old,), (new,) = outcome.before.of("prompt"), outcome.after.of("prompt")
    if method != "grace":
        assert new.log_probability > old.log_probability
    assert [type(module) for module in editor.model.modules()] == modules
    assert [p.requires_grad for p in editor.model.parameters()] == flags
    assert (editor.tokenizer.pad_token, editor.tokenizer.padding_side) == (pad, side)


@needs_easyedit
def test_grace_answers_the_prompt_it_was_told(editor, case):
    with checkouts.checkout("easyeditor"):
        (outcome,) = Evaluation(EasyEdit("grace", editor), fluency_tokens=0).each([case])
    (prompt,), (neighbour,) = outcome.after.of("prompt"), outcome.after.of("locality")
    target = editor.tokenizer(f"{case.prompt} Rome")["input_ids"][
        len(editor.tokenizer(case.prompt)["input_ids"])
    ]
    assert prompt.first == target and outcome.before.of("prompt")[0].first != target
    assert neighbour.text == outcome.before.of("locality")[0].text


def test_what_is_not_there_is_said(editor, case, monkeypatch):
    with pytest.raises(ValueError, match=r"expected one of easyedit:rome, .*, got 'easyedit:x'$"):
        EasyEdit("x", editor)
    with pytest.raises(ValueError, match="got 'easyedit:mend': EasyEdit's MEND needs a hypernetwork"):
        EasyEdit("mend", editor)
    monkeypatch.setitem(sys.modules, "easyeditor", None)
    before = checksums(editor.model)
    with pytest.raises(
        EngramError, match="baseline: expected the package easyeditor, which cannot be imported"
    ):
        EasyEdit("ft-l", editor).edit([case.edit])
    assert checksums(editor.model) == before
