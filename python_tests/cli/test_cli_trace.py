"""`engram trace` with a small random model on disk."""

import json
from functools import partial

import pytest
import torch
from model_zoo import byte_level_tokenizer, small_model

from engram_kernels.tracing import AverageTrace, Trace

FACT = ("--prompt", "{} lies in", "--subject", "Paris")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama-like model with its tokenizer, and facts of which it knows three."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = byte_level_tokenizer()
    model = small_model("llama", vocabulary=len(tokenizer))
    # Whatever it is asked, it answers Rome: the other rows are the largest one, shrunk.
    rome = tokenizer(" Rome")["input_ids"][0]
    with torch.no_grad():
        states = model.model(input_ids=torch.tensor([tokenizer("Paris lies in")["input_ids"]]))
        model.lm_head.weight[rome] = states.last_hidden_state[0, -1]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    rows = [
        {"prompt": prompt, "subject": subject, "attribute": attribute}
        for subject in ("Paris", "the Louvre", "Zürich", "São Paulo")
        for prompt in (f"{subject} lies in",)
        for attribute in ("Rome", "Japan")
    ]
    (path / "facts.json").write_text(json.dumps(rows))
    return path


@pytest.fixture
def engram(engram):
    return partial(engram, "trace")


def test_one_prompt(engram, folder, tmp_path):
    pytest.importorskip("matplotlib")
    files = [tmp_path / f"trace.{suffix}" for suffix in ("png", "svg", "json")]
    status, out, err = engram(
        "--model", folder, *FACT, "--kind", "hidden", "--kind", "mlp", "--samples", 2, "--device", "cpu",
        *(part for path in files for part in ("--out", path)),
    )  # fmt: skip
    assert status == 0, err
    assert "hidden" in out and "mlp, windows of 10 layers" in out and "p(Rome): " in out
    hidden, mlp = map(Trace.from_dict, json.loads(files[2].read_text()))
    assert (hidden.kind, mlp.kind, hidden.answer) == ("hidden", "mlp", "Rome")
    # The whole last state of the last token is the whole answer.
    assert hidden.effects[-1, -1].item() == pytest.approx(hidden.clean, abs=1e-5)
    assert files[0].read_bytes()[:4] == b"\x89PNG" and "<svg" in files[1].read_text()
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_facts(engram, folder, tmp_path):
    status, out, err = engram(
        "--model", folder, "--facts", folder / "facts.json", "--rows", 2, "--kind", "mlp", "--samples", 2,
        "--device", "cpu", "--out", tmp_path / "average.json",
    )  # fmt: skip
    assert status == 0, err
    (found,) = map(AverageTrace.from_dict, json.loads((tmp_path / "average.json").read_text()))
    assert found.kind == "mlp" and 1 <= found.facts <= 2
    assert "last subject token" in out and "p(the answer): " in out


BAD = {
    "nothing": ((), "--prompt: expected one with its subject, or facts, got neither"),
    "both": ((*FACT, "--facts", "x.json"), "--facts: expected no prompt, subject or target beside them"),
    "kind": ((*FACT, "--kind", "neuron"), "--kind: expected hidden, mlp or attention, got 'neuron'"),
    "suffix": (
        (*FACT, "--out", "x.jpg"),
        "--out: expected a name that ends in .png, .svg, .pdf or .json",
    ),
    "folder": ((*FACT, "--out", "no/such/x.svg"), "--out: expected a path in a folder that can be written"),
    "rows": (("--facts", "x.json", "--rows", "0"), "--rows: expected at least 1, got 0"),
    "missing": (("--facts", "no/such.json"), "--facts: expected a JSON file, got 'no/such.json'"),
    "no list": (
        ("--facts", "config.json"),
        "--facts: expected a list of objects with prompt, subject, attribute",
    ),
    "window": ((*FACT, "--window", "0"), "--window: expected at least 1, got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(engram, folder, monkeypatch, case):
    arguments, message = BAD[case]
    monkeypatch.chdir(folder)
    status, _, err = engram("--model", ".", *arguments, "--device", "cpu")
    assert status == 1 and err.startswith("Error: ") and message in err and err.count("\n") == 1


def test_facts_behind_a_byte_order_mark_with_windows_line_ends(engram, folder, tmp_path):
    content = (folder / "facts.json").read_text().replace("}, ", "},\r\n")
    (tmp_path / "facts.json").write_bytes(b"\xef\xbb\xbf" + content.encode())
    status, out, err = engram(
        "--model", folder, "--facts", tmp_path / "facts.json", "--rows", 1, "--samples", 1, "--device", "cpu"
    )
    assert status == 0 and "p(the answer): " in out, err


def test_facts_that_the_model_does_not_know(engram, folder, tmp_path):
    rows = [{"prompt": "Paris lies in", "subject": "Paris", "attribute": "Brazil"}]
    (tmp_path / "facts.json").write_text(json.dumps(rows))
    status, _, err = engram("--model", folder, "--facts", tmp_path / "facts.json", "--device", "cpu")
    assert status == 1 and "--facts: expected one that" in err and "knows, got none of 1" in err


def test_facts_that_are_none(engram, tmp_path):
    for content, message in (("[]", "at least one, got none in "), ("[" * 100_000, "a JSON file, got ")):
        (tmp_path / "facts.json").write_text(content)
        status, _, err = engram("--model", "not/loaded", "--facts", tmp_path / "facts.json")
        assert status == 1 and err.startswith(f"Error: --facts: expected {message}")


def test_facts_that_cannot_be_traced(engram, tmp_path):
    """All of them are looked at before the model is loaded."""
    good = {"prompt": "Paris lies in", "subject": "Paris", "attribute": "Brazil"}
    for change, message in (
        ({"attribute": " "}, "row 1 (attribute: expected some text, got ' ')"),
        ({"subject": "\ud83d"}, "row 1 (subject: expected whole characters, got '\\ud83d')"),
        (
            {"subject": "Rome"},
            "row 1 (prompt: expected {} or the subject 'Rome' exactly once, as whole words, "
            "got 'Paris lies in'",
        ),
    ):
        (tmp_path / "facts.json").write_text(json.dumps([good, {**good, **change}]))
        status, _, err = engram("--model", "not/loaded", "--facts", tmp_path / "facts.json")
        assert status == 1 and "facts: expected ones that can be traced, got " + message in err
