"""Runs: edits measured before and after, every weight put back, one by one or together."""

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
from evaluation_helpers import checksums, stub, timeless
from model_zoo import TEXTS, small_model

from engram_kernels import EngramError
from engram_kernels.editing import Editor
from engram_kernels.editing.values import ValueOptions
from engram_kernels.evaluation.fluency import fluency
from engram_kernels.evaluation.measures import ASPECTS, measure
from engram_kernels.evaluation.outcomes import Retained, summarise
from engram_kernels.evaluation.run import Evaluation, peak_memory

pytestmark = pytest.mark.usefixtures("one_thread")


def test_each_measures_and_puts_every_weight_back(tokenizer, cases):
    editor = stub(tokenizer)
    before = checksums(editor.model)
    unedited = measure(editor.model, tokenizer, cases)
    evaluation = Evaluation(editor, {"method": "rome", "layers": [1], "ridge": 0.1}, fluency_tokens=8)
    stages = []
    evaluation.progress = lambda *stage: stages.append(stage[:3])
    outcomes = evaluation.each(cases)
    assert checksums(editor.model) == before and evaluation.weights_as_before()
    assert all(outcome.reverted_exactly for outcome in outcomes)
    assert stages == [("cases", i, 4) for i in range(1, 5)]
    assert [call[0] for call in editor.calls] == [[case.edit] for case in cases]
    assert editor.calls[0][1:] == ("rome", {"ridge": 0.1})
    for case, outcome, figures in zip(cases, outcomes, unedited, strict=True):
        editor.edit([case.edit])
        (edited,) = measure(editor.model, tokenizer, [case])
        bits = fluency(editor.model, tokenizer, [case], 8)[0]
        editor.model.load_state_dict(small_model("llama", len(tokenizer)).state_dict())
        assert outcome.after == replace(edited, fluency=bits)
        assert outcome.before.margins["efficacy"] == pytest.approx(figures.margins["efficacy"], abs=1e-5)
        assert outcome.after.margins != outcome.before.margins
        assert (outcome.case, outcome.steps, outcome.loss) == (case.name, 2, 1.0) and outcome.seconds > 0


def test_an_edit_of_nothing_changes_nothing(tokenizer, cases):
    outcomes = Evaluation(stub(tokenizer, scale=0.0, dtype=torch.bfloat16), fluency_tokens=5).each(cases)
    assert all(outcome.before == outcome.after for outcome in outcomes)
    summary = summarise(outcomes)
    assert summary["edited"] == summary["unedited"] and summary["edited"]["locality_unchanged"] == 1


def test_weights_that_are_not_put_back_show(tokenizer, cases):
    evaluation = Evaluation(stub(tokenizer, rounds=True), fluency_tokens=0)
    assert [outcome.reverted_exactly for outcome in evaluation.each(cases)] == [False] * 4
    assert not evaluation.weights_as_before()


SKIPPED = "edits: expected at least one that can be made, got none: too long"


def test_skipped_edits_are_left_out_of_the_means(tokenizer, cases):
    everything = Evaluation(stub(tokenizer), fluency_tokens=0).each(cases)
    for run in ("each", "together"):
        editor = stub(tokenizer, refused=("Zürich",))
        before = checksums(editor.model)
        evaluation = Evaluation(editor, {"failures": "skip"}, fluency_tokens=0)
        outcomes = evaluation.each(cases) if run == "each" else evaluation.together(cases, [2, 3])[0]
        assert [outcome.skipped for outcome in outcomes] == [None, None, SKIPPED, None]
        assert outcomes[2].after is None and checksums(editor.model) == before
        summary = summarise(outcomes)
        assert (summary["rows"], summary["skipped"], summary["reverted_exactly"]) == (3, 1, 3)
        if run == "each":
            rest = summarise([everything[i] for i in (0, 1, 3)])
            assert summary["edited"] == rest["edited"] and summary["unedited"] == rest["unedited"]
    with pytest.raises(EngramError, match=r"data: expected a case that can be edited, got none: .* too long"):
        summarise([outcomes[2]])
    for run in ("each", "together"):
        with pytest.raises(EngramError, match="too long"):
            getattr(Evaluation(stub(tokenizer, refused=("Zürich",)), fluency_tokens=0), run)(cases)


def test_a_failure_leaves_every_weight(tokenizer, cases):
    for run in ("each", "together"):
        editor = stub(tokenizer, broken="Zürich")
        before, kept = checksums(editor.model), []
        evaluation = Evaluation(editor, fluency_tokens=0)
        with pytest.raises(EngramError, match="expected a finite loss"):
            if run == "each":
                evaluation.each(cases, keep=lambda outcomes, kept=kept: kept.append(len(outcomes)))
            else:
                evaluation.together(cases, [1, 2])
        assert checksums(editor.model) == before and evaluation.weights_as_before()
        assert kept == ([1, 2] if run == "each" else [])


def test_together_measures_what_stands_at_each_checkpoint(tokenizer, cases):
    editor = stub(tokenizer)
    before = checksums(editor.model)
    evaluation = Evaluation(editor, {"method": "rome"}, fluency_tokens=0)
    outcomes, retained = evaluation.together(cases, [1, 3, 3, 9])
    assert checksums(editor.model) == before and all(outcome.reverted_exactly for outcome in outcomes)
    assert [len(call[0]) for call in editor.calls] == [1, 2, 1]
    expected = []
    for done, stops in ((1, [1]), (3, [1, 3]), (4, [1, 3, 4])):
        fresh = stub(tokenizer)
        fresh.edit([case.edit for case in cases[:done]])
        holds = [figures.successes("efficacy") for figures in measure(fresh.model, tokenizer, cases[:done])]
        expected += [Retained(done, stop, sum(holds[:stop]) / stop) for stop in stops]
    assert retained == expected
    for outcome, figures in zip(outcomes, measure(fresh.model, tokenizer, cases), strict=True):
        assert outcome.after == figures


@pytest.mark.parametrize(
    "options", [{"method": "emmet"}, {"preserve": True}, {"batch": 2}, {"layers": [1, 2]}], ids=str
)
def test_edits_that_know_of_each_other_are_one_call(tokenizer, cases, options):
    editor = stub(tokenizer)
    Evaluation(editor, options, fluency_tokens=0).together(cases, [1, 2])
    assert [len(edits) for edits, *_ in editor.calls] == [4]


def test_each_call_has_its_folder(tokenizer, cases, tmp_path):
    editor = stub(tokenizer)
    Evaluation(editor, fluency_tokens=0).together(cases, [1, 3], tmp_path)
    folders = [options["directory"] for *_, options in editor.calls]
    assert folders == [tmp_path / name for name in ("000000", "000001", "000003")]


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_the_editor_itself(tokenizer, cases, tmp_path, method):
    model = small_model("llama", len(tokenizer))
    before = checksums(model)
    options = {"steps": 2, "learning_rate": 0.02, "weight_decay": 0.0}
    editor = Editor(
        model, tokenizer, corpus=TEXTS * 4, cache_dir=tmp_path / "cache", contexts=((3, 2),),
        value=ValueOptions(**options),
    )  # fmt: skip
    evaluation = Evaluation(
        editor, {"method": method, "layers": [1, 2][: 1 + (method == "memit")]}, fluency_tokens=0
    )
    outcomes, retained = evaluation.together(cases, [2], tmp_path / "run")
    assert checksums(model) == before and evaluation.weights_as_before()
    done = [4] if method == "memit" else [2, 4]
    assert sorted({item.edits for item in retained}) == done
    assert len(list((tmp_path / "run").iterdir())) == len(done)
    for outcome in outcomes:
        assert (
            outcome.reverted_exactly
            and outcome.steps == 2
            and outcome.before.margins != outcome.after.margins
        )
    again, _ = evaluation.together(cases, [2], tmp_path / "run")
    assert timeless(again) == timeless(outcomes)


def test_joint_methods_are_one_call(tokenizer, cases):
    editor = stub(tokenizer)
    _, retained = Evaluation(editor, {"method": "memit", "batch": 2}, fluency_tokens=0).together(cases, [2])
    assert [(len(edits), *call) for edits, *call in editor.calls] == [(4, "memit", {"batch": 2})]
    assert [(item.edits, item.first) for item in retained] == [(4, 2), (4, 4)]


def test_summary_is_that_of_brute_force(tokenizer, cases):
    outcomes = Evaluation(stub(tokenizer), fluency_tokens=6).each(cases)
    summary = summarise(outcomes)
    assert (summary["rows"], summary["skipped"], summary["reverted_exactly"]) == (4, 0, 4)
    for when, state in (("before", "unedited"), ("after", "edited")):
        figures, found = [getattr(outcome, when) for outcome in outcomes], summary[state]
        for aspect in ASPECTS:
            right = [[margin > 0 for margin in one.margins[aspect]] for one in figures]
            assert found[aspect] == pytest.approx(sum(sum(one) / len(one) for one in right) / 4)
            tokens = [sum(one.shares[aspect]) / len(one.shares[aspect]) for one in figures]
            assert found[f"{aspect}_tokens"] == pytest.approx(sum(tokens) / 4)
        three = [found[aspect] for aspect in ASPECTS]
        assert found["score"] == pytest.approx(0 if 0 in three else 3 / sum(1 / x for x in three))
        assert found["fluency"] == pytest.approx(sum(one.fluency for one in figures) / 4)
    unchanged = [outcome.after.unchanged(outcome.before) for outcome in outcomes]
    assert summary["edited"]["locality_unchanged"] == pytest.approx(sum(unchanged) / 4)
    assert summary["unedited"]["locality_unchanged"] == 1


def test_peak_memory_is_unknown_where_the_system_does_not_tell_it(monkeypatch):
    assert peak_memory(torch.device("cpu")) > 2**20
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory(torch.device("cpu")) is None
    # Windows has no such module: importing this one must not ask for it.
    spec = importlib.util.find_spec("engram_kernels.evaluation.run")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_bad_numbers(tokenizer):
    with pytest.raises(ValueError, match="fluency_tokens: expected at least 0, got -1"):
        Evaluation(stub(tokenizer), fluency_tokens=-1)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        Evaluation(stub(tokenizer), batch_size=0)
