"""`engram eval`."""

import importlib.metadata
import json
import re
import sys
from functools import partial

import pytest
from command_line import refused
from evaluation_helpers import EASY_EDIT, ROME, ZSRE, ZSRE_EASY_EDIT, StubEditor, without
from model_zoo import TEXTS, small_model

import engram_kernels
from engram_kernels.cli.common import versions
from engram_kernels.editing import load_model
from engram_kernels.evaluation.datasets import read_cases
from engram_kernels.evaluation.measures import measure
from engram_kernels.evaluation.report import EvalReport
from engram_kernels.evaluation.run import CHECKPOINTS, Evaluation

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A random Llama-like model with its tokenizer, rows and a corpus, as a user has them on disk."""
    path = tmp_path_factory.mktemp("model")
    small_model("llama", vocabulary=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "corpus.txt").write_text("\n\n".join(TEXTS * 4))
    (path / "counterfact.json").write_text(json.dumps([EASY_EDIT, ROME, {**EASY_EDIT, "case_id": 8}]))
    (path / "zsre.jsonl").write_text("\n".join(map(json.dumps, [ZSRE, ZSRE_EASY_EDIT])))
    return path


@pytest.fixture
def engram(engram, monkeypatch, folder):
    monkeypatch.setenv("ENGRAM_CACHE", str(folder / "cache"))
    monkeypatch.setenv("ENGRAM_DATA", str(folder))
    asked = ("--model", folder, "--device", "cpu", "--corpus", folder / "corpus.txt", "--drift-rows", "0")
    return partial(engram, "eval", *asked)


@pytest.fixture
def stubbed(monkeypatch):
    """`engram eval` with the stub in the editor's place."""
    made = []

    def editor(model, tokenizer, **options):
        made.append(StubEditor(model, tokenizer))
        made[-1].options = options
        return made[-1]

    monkeypatch.setattr("engram_kernels.editing.Editor", editor)
    return made


def test_the_command_edits_measures_and_reports(engram, folder, tmp_path):
    report, plot = tmp_path / "out.json", tmp_path / "out.png"
    status, out, err = engram(
        "--data", "counterfact.json", "--rows", "2", "--layer", "1", "--steps", "2", "--fluency", "5",
        "--drift-text", folder / "corpus.txt", "--drift-rows", "1",
        "--report", report, "--plot", plot,
    )  # fmt: skip
    assert status == 0, err
    content = json.loads(report.read_text())
    summary = content["summary"]
    assert [row["case"] for row in content["rows"]] == ["7", "3"] and all(
        row["steps"] for row in content["rows"]
    )
    assert summary["reverted_exactly"] == 2 and summary["weights_as_before"] and summary["refused"] == []
    assert summary["peak_memory"] > 2**20 and 0 < content["rows"][0]["probability"] < 1
    assert content["settings"]["layers"] == [1] and content["settings"]["steps"] == 2
    assert {"engram_kernels", "torch", "transformers"} == content["versions"].keys()
    for text in (
        "begins with",
        "contains",
        "all tokens likeliest",
        "fluency, bits",
        "first token kept",
        "2/2",
    ):
        assert text in " ".join(out.split()).replace("│ ", ""), out
    network, tokenizer = load_model(folder)
    for row, case in zip(content["rows"], read_cases(folder / "counterfact.json", 0, 2).cases, strict=True):
        (figures,) = measure(network, tokenizer, [case])
        assert [one["text"] for one in row["before"]["answers"]] == [one.text for one in figures.answers]
        for one, other in zip(row["before"]["answers"], figures.answers, strict=True):
            assert one["log_probability"] == pytest.approx(other.log_probability)
        assert row["before"]["drift"]["text_loss"] == pytest.approx(summary["drift"]["text_loss"]["unedited"])
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png"]


def test_the_command_goes_on_where_it_was_cut_off(engram, stubbed, tmp_path, monkeypatch):
    report, asked = tmp_path / "out.json", ("--data", "counterfact.json", "--fluency", "0")
    whole = tmp_path / "whole.json"
    assert engram(*asked, "--report", whole)[0] == 0
    write = EvalReport.write

    def cut_off(self, outcomes, *rest):
        write(self, outcomes, *rest)
        if len(outcomes) == 2:
            raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(EvalReport, "write", cut_off)
        status, _, err = engram(*asked, "--report", report)
    assert status == 1 and err == "Error: disk full\n"
    assert len(json.loads(report.read_text())["rows"]) == 2
    status, _, err = engram(*asked, "--report", report, "--seed", "1")
    refused((status, _, err), "--report: expected one of the same settings")
    assert "seed" in err
    status, out, _ = engram(*asked, "--report", report)
    assert status == 0 and len(stubbed[-1].calls) == 1 and "3/3" in out
    contents = [json.loads(path.read_text()) for path in (report, whole)]
    for content in contents:
        for row in content["rows"]:
            del row["seconds"]
        del content["summary"]["median_seconds"], content["summary"]["peak_memory"]
    assert contents[0] == contents[1]
    before = report.read_bytes()
    status, again, _ = engram(*asked, "--report", report)
    assert status == 0 and stubbed[-1].calls == [] and report.read_bytes() == before and "3/3" in again
    assert "complete: nothing was measured again" in " ".join(again.split())


def test_the_command_edits_together(engram, stubbed, tmp_path):
    report = tmp_path / "out.json"
    status, out, err = engram(
        "--data", "zsre.jsonl", "--mode", "together", "--method", "memit", "--layer", "1", "--layer", "2",
        "--ridge", "0.5", "--batch", "7", "--preserve", "--conflicts", "last", "--failures", "skip",
        "--null-space", "0.1", "--checkpoint", "1", "--fluency", "0", "--report", report,
        "--plot", tmp_path / "out.png", "--bare-prompt-weight", "0.25", "--original-key", "--clamp", "3",
    )  # fmt: skip
    assert status == 0, err
    ((edits, method, options),) = stubbed[-1].calls
    assert len(edits) == 2 and method == "memit"
    assert options == {
        "ridge": 0.5, "batch": 7, "preserve": True, "null_space": 0.1, "conflicts": "last",
        "failures": "skip", "directory": tmp_path / "out.json.run" / "000000",
    }  # fmt: skip
    given = stubbed[-1].options
    assert (
        given["bare_prompt_weight"] == 0.25 and given["consistent_key"] is False and given["value"].clamp == 3
    )
    content = json.loads(report.read_text())
    assert [(item["edits"], item["first"]) for item in content["retention"]] == [(2, 1), (2, 2)]
    assert "first 1 of 2 edits: begins with the target" in out and "fluency" not in out


def test_a_run_of_edits_together_is_gone_on_with(engram, tmp_path, monkeypatch):
    report = tmp_path / "out.json"
    asked = (
        "--data", "zsre.jsonl", "--mode", "together", "--method", "memit", "--layer", "1", "--layer", "2",
        "--steps", "2", "--fluency", "0", "--report", report,
    )  # fmt: skip

    def cut_off(*_):
        raise OSError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "_retained", cut_off)
        status, _, err = engram(*asked)
        assert status == 1 and err.endswith("Error: cut off\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json.run"]
    kept = sorted(path.name for path in (tmp_path / "out.json.run" / "000000").rglob("*.safetensors"))
    assert kept == ["000000.safetensors", "000000.safetensors", "000001.safetensors"]
    status, out, err = engram(*asked)
    assert status == 0 and "2/2" in out, err
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_the_command_where_peak_memory_is_unknown(engram, stubbed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    report = tmp_path / "out.json"
    status, out, err = engram("--data", "counterfact.json", "--fluency", "0", "--report", report)
    assert status == 0, err
    assert "unknown" in out and json.loads(report.read_text())["summary"]["peak_memory"] is None


def test_the_package_s_own_version_needs_no_metadata(monkeypatch):
    """It may be a checkout on the path, which nobody installed."""
    installed = importlib.metadata.version

    def missing(name):
        if name.startswith("engram"):
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert versions()["engram_kernels"] == engram_kernels.__version__


def test_the_defaults(engram, stubbed):
    status, out, err = engram("--data", "zsre.jsonl", "--rows", "1", "--start", "1", "--fluency", "0")
    assert status == 0, err
    ((edits, method, options),) = stubbed[-1].calls
    assert [edit.subject for edit in edits] == ["São Paulo"] and method == "engram" and "1/1" in out
    assert options["ridge"] is None and options["failures"] == "raise" and CHECKPOINTS == (10, 50, 100)


BAD = {
    "no file": (("--data", "none.json"), "--data: expected a file of rows"),
    "mode": (("--data", "zsre.jsonl", "--mode", "all"), "--mode: expected one of each, together, got 'all'"),
    "start": (("--data", "zsre.jsonl", "--start", "2"), "--start: expected from 0 to 1, the last row, got 2"),
    "fluency": (("--data", "zsre.jsonl", "--fluency", "-1"), "--fluency: expected at least 0, got -1"),
    "plot": (("--data", "zsre.jsonl", "--plot", "x.jpg"), "--plot: expected a name that ends in .png"),
    "report": (("--data", "zsre.jsonl", "--report", "no/such/x"), "--report: expected a path in a folder"),
    "zsre": (("--data", "zsre.jsonl", "--zsre", "mend"), "--zsre: expected one of memit, easyedit, got"),
    "give": (("--data", "zsre.jsonl", "--give", "-1"), "--give: expected at least 0, got -1"),
    "chat": (
        ("--data", "zsre.jsonl", "--chat"),
        "--chat: expected a model whose tokenizer has a chat template",
    ),
    "judge": (("--data", "zsre.jsonl", "--judge", " "), "--judge: expected a command, got ' '"),
    "known": (("--data", "zsre.jsonl", "--known", "none.json"), "--known: expected a file of rows"),
    "known facts": (("--data", "zsre.jsonl", "--known", "zsre.jsonl"), "--known: expected some text under"),
    "drift text": (
        ("--data", "zsre.jsonl", "--drift-text", "none.txt"),
        "--drift-text: expected a path that can be read, got 'none.txt' (No such file or directory)",
    ),
    "corpus": (
        ("--data", "zsre.jsonl", "--corpus", "none.txt"),
        "--corpus: expected a path that can be read, got 'none.txt' (No such file or directory)",
    ),
    "deep": (("--data", "deep.json"), "--data: expected JSON in 'deep.json', got '[[["),
    "half a character": (
        ("--data", "half.json"),
        "--data: expected whole characters under 'subject' in row 0, got 'The \\ud83d Louvre'",
    ),
    "half in a paraphrase": (
        ("--data", "half.json", "--start", 1),
        "--data: expected whole characters under 'rephrase_prompt' or 'rephrase' in row 1, got '",
    ),
    "lm-eval": (("--data", "zsre.jsonl", "--lm-eval", "x"), "--lm-eval: expected the mode together"),
    "baseline": (
        ("--data", "zsre.jsonl", "--baseline", "rome"),
        "--baseline: expected one of easyedit:rome, ",
    ),
    "steps": (("--data", "zsre.jsonl", "--steps", "0"), "--steps: expected at least 1, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(engram, stubbed, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    halves = [{**EASY_EDIT, "subject": "The \ud83d Louvre"}, {**EASY_EDIT, "rephrase_prompt": "\ud83d"}]
    (tmp_path / "half.json").write_text(json.dumps(halves))
    arguments, message = BAD[name]
    refused(engram(*arguments), message)
    assert all(not editor.calls for editor in stubbed)


def test_bad_rows_are_left_out_if_asked_for(engram, stubbed, folder, tmp_path):
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([without(EASY_EDIT, "subject"), EASY_EDIT]))
    status, _, err = engram("--data", data, "--fluency", "0")
    assert status == 1 and "under 'subject' in row 0, got none" in err
    status, out, err = engram("--data", data, "--fluency", "0", "--skip-bad")
    assert status == 0, err
    assert "Left out: data: expected some text under 'subject' in row 0" in out and "1/1" in out


def test_a_row_longer_than_the_context_is_found_before_any_edit(engram, stubbed, tmp_path):
    """It is named, shown in short, and left out if asked for."""
    data = tmp_path / "rows.json"
    long = {**EASY_EDIT, "case_id": 9, "locality_prompt": "the towers " * 200}
    data.write_text(json.dumps([EASY_EDIT, long]))
    status, _, err = engram("--data", data, "--fluency", "0")
    assert status == 1 and not stubbed and len(err) < 400
    assert "Error: --data: case 9: prompt: expected at most 128 tokens" in err and "the t…'; " in err
    assert err.endswith("; --skip-bad leaves it out\n")
    status, out, err = engram("--data", data, "--fluency", "0", "--skip-bad")
    assert status == 0 and "Left out: data: case 9: prompt: expected at most 128 tokens" in out, err
    assert [edit.subject for edits, *_ in stubbed[0].calls for edit in edits] == ["The Louvre"]


def test_the_options_of_an_honest_evaluation(engram, stubbed, folder, tmp_path, monkeypatch):
    judge = tmp_path / "judge.py"
    judge.write_text("import sys\nfor line in sys.stdin:\n    print(1)")
    tasks = iter([{"lambada": {"acc,none": 0.25}}, {"lambada": {"acc,none": 0.5}}])
    monkeypatch.setattr("engram_kernels.evaluation.harness.run_tasks", lambda *_: next(tasks))
    report = tmp_path / "out.json"
    status, out, err = engram(
        "--data", "zsre.jsonl", "--zsre", "easyedit", "--mode", "together", "--method", "memit",
        "--judge", f"{sys.executable} {judge}", "--lm-eval", "lambada", "--report", report,
    )  # fmt: skip
    assert status == 0, err
    content = json.loads(report.read_text())
    assert {answer["judged"] for answer in content["rows"][0]["after"]["answers"]} == {1}
    assert content["summary"]["lm_eval"]["edited"] == {"lambada": {"acc,none": 0.5}}
    assert content["settings"]["zsre"] == "easyedit" and "judged" in out
    assert re.search(r"lambada, acc,none +0\.250 +0\.500", out)
    ((edits, *_),) = stubbed[-1].calls
    assert [edit.target for edit in edits] == ["Brazil", "Japan"]
