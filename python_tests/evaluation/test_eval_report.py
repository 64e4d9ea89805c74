"""Reports: gone on with, refused, read back."""

import json
from dataclasses import asdict

import pytest
from evaluation_helpers import stub, timeless

from engram_kernels.evaluation.outcomes import Outcome, Retained, summarise
from engram_kernels.evaluation.report import EvalReport
from engram_kernels.evaluation.run import Evaluation

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_is_gone_on_with(tokenizer, cases, tmp_path):
    path, settings, versions = tmp_path / "report.json", {"layers": (1,), "ridge": None}, {"torch": "2"}
    whole = Evaluation(stub(tokenizer), fluency_tokens=4).each(cases)

    def until_two(outcomes):
        report.write(outcomes)
        if len(outcomes) == 2:
            raise KeyboardInterrupt

    report = EvalReport(path, settings, versions)
    with pytest.raises(KeyboardInterrupt):
        Evaluation(stub(tokenizer), fluency_tokens=4).each(cases, keep=until_two)
    report = EvalReport(path, settings, versions)
    assert not report.complete and timeless(report.outcomes) == timeless(whole[:2])
    editor = stub(tokenizer)
    outcomes = Evaluation(editor, fluency_tokens=4).each(cases, report.outcomes, report.write)
    assert [edits for edits, *_ in editor.calls] == [[case.edit] for case in cases[2:]]
    assert timeless(outcomes) == timeless(whole)
    report.write(outcomes, [Retained(4, 2, 0.5)], summarise(outcomes))
    final = EvalReport(path, settings, versions)
    assert final.complete and final.outcomes == outcomes and final.retained == [Retained(4, 2, 0.5)]
    assert final.summary == summarise(outcomes)
    assert [item.name for item in tmp_path.iterdir()] == ["report.json"]


def test_reports_that_are_refused(tmp_path):
    path = tmp_path / "report.json"
    settings, versions = {"layers": [1], "ridge": None, "seed": 0}, {"torch": "2.13"}
    EvalReport(path, settings, versions).write([])
    before = path.read_bytes()
    for change, version, names in (
        ({"layers": [2]}, "2.13", "layers"),
        ({"ridge": 0.5, "seed": 1}, "2.13", "ridge, seed"),
        ({"new": None}, "2.13", "new"),
        ({}, "2.14", "torch"),
    ):
        with pytest.raises(ValueError, match=f"report: expected one of the same settings .* in {names}$"):
            EvalReport(path, settings | change, {"torch": version})
    assert path.read_bytes() == before
    for content in ("", "[]", '{"format": 1}', '{"format": 3}', '{"answers": 1}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="report: expected a new file or an evaluation's report, got "):
            EvalReport(path, settings, versions)
        assert path.read_text() == content


def test_outcomes_survive_json(tokenizer, cases):
    for outcome in Evaluation(stub(tokenizer), fluency_tokens=3).each(cases):
        assert Outcome.read(json.loads(json.dumps(asdict(outcome)))) == outcome
