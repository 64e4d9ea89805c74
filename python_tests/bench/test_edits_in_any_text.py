"""Edits in any text: what is trained is what is shown, and facts are asked after all calls."""

import pytest

pytest.importorskip("transformers")

import edits_in_any_text as bench
import model_zoo
from editing_helpers import changed, small_editor, weights

from engram_kernels.editing import Edit, ValueOptions


@pytest.mark.parametrize("edit", [*bench.EDITS.values(), *bench.FACTS], ids=lambda edit: edit.text)
def test_the_tokens_that_are_trained_are_the_text_that_is_shown(edit):
    assert bench.trained_as_shown(model_zoo.byte_level_tokenizer(), edit)


def test_a_space_that_was_not_shown_would_be_seen(monkeypatch):
    tokenizer = model_zoo.byte_level_tokenizer()
    monkeypatch.setattr(Edit, "text", "中国的首都是 纽约")
    assert not bench.trained_as_shown(tokenizer, bench.EDITS["Chinese"])


def test_facts_are_asked_after_all_calls_and_taken_back(cache):
    editor = small_editor(cache_dir=cache, value=ValueOptions(steps=2, learning_rate=0.02))
    before = weights(editor.model)
    with pytest.warns(UserWarning, match="did not take"):
        found = bench.held(editor.model, editor.tokenizer, editor, [bench.FACTS[:2], bench.FACTS[2:]])
    assert [one["fact"] for one in found] == [fact.text for fact in bench.FACTS]
    assert all(0 <= one["probability"] <= 1 for one in found) and not changed(before, editor.model)
