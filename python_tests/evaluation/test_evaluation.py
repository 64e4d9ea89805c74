"""Runs: edits measured before and after, every weight put back, one by one or together."""

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
from evaluation_helpers import MQUAKE, checksums, stub, timeless, written
from model_zoo import TEXTS, small_model

from engram_kernels import EngramError
from engram_kernels.editing import Editor
from engram_kernels.editing.search.values import ValueOptions
from engram_kernels.evaluation.drift import Drift
from engram_kernels.evaluation.fluency import fluency
from engram_kernels.evaluation.measures import measure
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
        assert said(outcome.before) == said(figures) and outcome.after.answers != outcome.before.answers
        assert (outcome.case, outcome.steps, outcome.loss) == (case.name, 2, 1.0) and outcome.seconds > 0


def test_an_edit_of_nothing_changes_nothing(tokenizer, cases):
    outcomes = Evaluation(stub(tokenizer, scale=0.0, dtype=torch.bfloat16), fluency_tokens=5).each(cases)
    assert all(outcome.before == outcome.after for outcome in outcomes)
    summary = summarise(outcomes)
    for aspect in summary["aspects"].values():
        both = [found for found in aspect.values() if isinstance(found, dict) and "unedited" in found]
        assert both and all(found["unedited"] == found["edited"] for found in both)
    assert summary["aspects"]["locality"]["first_token_kept"] == {"edited": 1}
    assert summary["fluency"]["unedited"] == summary["fluency"]["edited"]


def test_weights_that_are_not_put_back_show(tokenizer, cases):
    evaluation = Evaluation(stub(tokenizer, rounds=True), fluency_tokens=0)
    assert [outcome.reverted_exactly for outcome in evaluation.each(cases)] == [False] * 4
    assert not evaluation.weights_as_before()


def said(figures):
    return [(one.prompt, one.text) for one in figures.answers]


SKIPPED = "edits: expected at least one that can be made, got none: too long"


def test_skipped_edits_are_left_out_of_the_means(tokenizer, cases):
    everything = Evaluation(stub(tokenizer), fluency_tokens=0).each(cases)
    for run in ("each", "together"):
        editor = stub(tokenizer, refused=("Zürich",))
        before = checksums(editor.model)
        evaluation = Evaluation(editor, {"method": "rome", "failures": "skip"}, fluency_tokens=0)
        outcomes = evaluation.each(cases) if run == "each" else evaluation.together(cases, [2, 3])[0]
        assert [outcome.skipped for outcome in outcomes] == [None, None, SKIPPED, None]
        assert outcomes[2].after is None and checksums(editor.model) == before
        summary = summarise(outcomes)
        assert (summary["rows"], summary["skipped"], summary["reverted_exactly"]) == (3, 1, 3)
        if run == "each":
            rest = summarise([everything[i] for i in (0, 1, 3)])
            assert summary["aspects"] == rest["aspects"]
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
        holds = [figures.answers[0].begins for figures in measure(fresh.model, tokenizer, cases[:done])]
        expected += [Retained(done, stop, sum(holds[:stop]) / stop) for stop in stops]
    assert retained == expected
    for outcome, figures in zip(outcomes, measure(fresh.model, tokenizer, cases), strict=True):
        assert outcome.after == figures


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "emmet"}]
    + [{"method": "rome"} | more for more in ({"preserve": True}, {"batch": 2}, {"layers": [1, 2]})],
    ids=str,
)
def test_edits_that_know_of_each_other_are_one_call(tokenizer, cases, options):
    editor = stub(tokenizer)
    Evaluation(editor, options, fluency_tokens=0).together(cases, [1, 2])
    assert [len(edits) for edits, *_ in editor.calls] == [4]


def test_each_call_has_its_folder(tokenizer, cases, tmp_path):
    editor = stub(tokenizer)
    Evaluation(editor, {"method": "rome"}, fluency_tokens=0).together(cases, [1, 3], tmp_path)
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
            and outcome.before.answers != outcome.after.answers
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
        figures = [getattr(outcome, when) for outcome in outcomes]
        bits = sum(one.fluency for one in figures) / 4
        assert summary["fluency"][state] == pytest.approx(bits)
        for aspect, found in summary["aspects"].items():
            own = [[a for a in one.answers if a.aspect == aspect] for one in figures]
            own = [answers for answers in own if answers]
            assert found["cases"] == len(own) and found["questions"] == sum(map(len, own))
            for name in ("begins", "contains", "exact", "argmax", "tokens", "log_probability"):
                means = [sum(getattr(a, name) for a in answers) / len(answers) for answers in own]
                assert found[name][state] == pytest.approx(sum(means) / len(own))
            likelier = [sum(a.margin > 0 for a in answers) / len(answers) for answers in own]
            assert found["likelier"][state] == pytest.approx(sum(likelier) / len(own))
    assert list(summary["aspects"]) == ["prompt", "generation prompt", "locality", "paraphrase"]
    kept = [
        sum(
            a.first == b.first
            for a, b in zip(one.before.of("locality"), one.after.of("locality"), strict=True)
        )
        / len(one.before.of("locality"))
        for one in outcomes
    ]
    assert summary["aspects"]["locality"]["first_token_kept"]["edited"] == pytest.approx(sum(kept) / 4)


def test_the_facts_of_a_case_are_edited_together(tokenizer, tmp_path):
    (case,) = written(tmp_path / "a.json", [MQUAKE])
    editor = stub(tokenizer)
    (outcome,) = Evaluation(editor, fluency_tokens=0).each([case])
    assert [edits for edits, *_ in editor.calls] == [list(case.edits)] and outcome.reverted_exactly
    assert outcome.edit == "Hamlet was written by → Goethe and 1 more"
    editor = stub(tokenizer, refused=("Goethe",))
    before = checksums(editor.model)
    for run in ("each", "together"):
        evaluation = Evaluation(editor, {"failures": "skip"}, fluency_tokens=0)
        (outcome,) = evaluation.each([case]) if run == "each" else evaluation.together([case])[0]
        # One of its facts could not be written: the case is none.
        assert outcome.skipped == "too long" and outcome.after is None
    assert checksums(editor.model) == before


def test_a_row_that_is_there_twice_is_measured_twice(tokenizer, tmp_path):
    """The editor makes the fact once; it stands for both rows, and for a case that shares it."""
    shared = {**MQUAKE, "case_id": 12, "requested_rewrite": MQUAKE["requested_rewrite"][:1]}
    cases = written(tmp_path / "a.json", [MQUAKE, shared, MQUAKE])
    value = ValueOptions(steps=2, learning_rate=0.1, weight_decay=0.0)
    editor = Editor(
        small_model("llama", len(tokenizer)), tokenizer, corpus=TEXTS * 4, cache_dir=tmp_path, contexts=(),
        value=value,
    )  # fmt: skip
    outcomes, _ = Evaluation(editor, {"method": "rome"}, fluency_tokens=0).together(cases)
    assert [outcome.skipped for outcome in outcomes] == [None] * 3
    assert outcomes[0].after.answers == outcomes[2].after.answers != outcomes[0].before.answers


def test_drift_and_a_judge(tokenizer, cases):
    editor = stub(tokenizer)
    drift = Drift(editor.model, tokenizer, [tokenizer("The tower is in Rome and in Paris.")["input_ids"]])
    asked = []

    def judge(answers):
        asked.extend(answers)
        return [len(each["text"]) % 2 for each in answers]

    outcomes = Evaluation(editor, fluency_tokens=0, drift=drift, judge=judge).each(cases[:2])
    losses = [outcome.after.drift["text_loss"] for outcome in outcomes]
    assert outcomes[0].before.drift == drift.measure(editor.model) and len({*losses}) == 2
    for outcome in outcomes:
        for one in outcome.after.answers:
            assert one.judged == len(one.text) % 2
    assert {"prompt", "answer", "text"} == asked[0].keys()
    summary = summarise(outcomes)
    assert summary["drift"]["text_loss"]["edited"] == pytest.approx(sum(losses) / 2)
    assert 0 <= summary["aspects"]["prompt"]["judged"]["edited"] <= 1


def test_what_runs_while_all_edits_stand(tokenizer, cases):
    editor, seen = stub(tokenizer), []
    before = checksums(editor.model)
    Evaluation(editor, fluency_tokens=0).together(
        cases, standing=lambda: seen.append(checksums(editor.model))
    )
    assert len(seen) == 1 and seen[0] != before and checksums(editor.model) == before


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
