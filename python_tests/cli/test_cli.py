"""The command line, with a small random model on disk."""

import json

import pytest
from model_zoo import TEXTS, byte_level_tokenizer, small_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama-like model with its tokenizer, and a corpus, as a user has them on disk."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = byte_level_tokenizer()
    small_model("llama", vocabulary=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "corpus.txt").write_text("\n\n".join(TEXTS * 4))
    return path


@pytest.fixture
def engram(engram, monkeypatch, folder):
    monkeypatch.setenv("ENGRAM_CACHE", str(folder / "cache"))
    return engram


FACT = ("--subject", "The Eiffel Tower", "--prompt", "{} is located in the city of", "--target", "Rome")


def test_doctor_names_every_operator_and_backend(engram):
    from engram_kernels.ops.define import OPERATORS

    status, out, _ = engram("doctor")
    assert status == 0
    for name in (*OPERATORS, "torch", "cpu", "triton", "cuda"):
        assert name in out
    # What is a claim, and not more than that.
    assert out.count("executed as PTX on a CPU; not run on a GPU") == 2


def test_edit_reports_and_saves(engram, folder, tmp_path):
    report = tmp_path / "report.json"
    status, out, err = engram(
        "edit", "--model", folder, "--corpus", folder / "corpus.txt", *FACT,
        "--paraphrase", "To see {}, go to", "--control", "The Louvre is located in",
        "--save", tmp_path / "edit", "--report", report, "--device", "cpu",
    )  # fmt: skip
    assert status == 0, err
    assert "The Louvre is located in" in out and "→ Rome" in out
    content = json.loads(report.read_text())
    assert [row["kind"] for row in content["answers"]] == ["edited", "paraphrase", "control"]
    # A random model has no fact to win; the probability must be measured on both sides of the write.
    assert 0 < content["probability"]["before"] != content["probability"]["after"] < 1

    from engram_kernels.editing import EditResult

    assert EditResult.from_pretrained(tmp_path / "edit").records[0].edit.target == "Rome"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edit", "report.json"]


def test_strict_fails_when_an_answer_is_not_as_wanted(engram, folder):
    # A random model does not learn the word, so the row of the edited prompt fails.
    status, out, err = engram(
        "edit", "--model", folder, "--corpus", folder / "corpus.txt", *FACT, "--device", "cpu", "--strict",
        "--control", "In [/b]",
    )  # fmt: skip
    assert "✗" in out and "In [/b]" in out
    assert status == 1 and err.startswith("Error: strict: ")


BAD = {
    "subject not in prompt": (("--prompt", "Paris is the capital of"), "prompt: "),
    "empty target": (("--target", " "), "target: "),
    "unknown layer": (("--layer", "99"), "layer: expected from 0 to 3 for this model, got 99"),
    "unknown dtype": (("--dtype", "int4"), "dtype: "),
    "missing corpus": (("--corpus", "no/such/file"), "corpus: "),
    "empty corpus": (("--corpus", "/dev/null"), "corpus: "),
    "markup in the model's name": (("--model", "[/x]"), "[/x]"),
    "folder of the report": (
        ("--report", "no/such/folder/report.json"),
        "report: expected a path in a folder",
    ),
    "folder of the edit": (("--save", "no/such/folder/edit"), "save: expected a path in a folder"),
    "device that is not there": (("--device", "foo"), "device: "),
    "paraphrase without subject": (("--paraphrase", "Where is it?"), "prompt: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(engram, folder, case):
    change, message = BAD[case]
    status, _, err = engram(
        "edit", "--model", folder, "--corpus", folder / "corpus.txt", *FACT, "--device", "cpu", *change
    )
    assert status == 1
    assert err.startswith("Error: ") and message in err and err.count("\n") == 1


def test_a_warning_is_one_sentence_without_a_line_of_code(monkeypatch, capsys):
    import warnings

    from engram_kernels import cli

    def warn():
        for filename in (cli.__file__, "elsewhere.py"):
            print(warnings.formatwarning("corpus: expected more", UserWarning, filename, 7))

    default = warnings.formatwarning
    monkeypatch.setattr(cli, "app", warn)
    cli.main()
    assert capsys.readouterr().out == (
        "Warning: corpus: expected more\n\nelsewhere.py:7: UserWarning: corpus: expected more\n\n"
    )
    assert warnings.formatwarning is default


def test_checkpoints_that_cannot_be_read_are_one_sentence(engram, folder, tmp_path, monkeypatch):
    import shutil

    import transformers

    shutil.copytree(folder, tmp_path / "wide", ignore=shutil.ignore_patterns("cache"))
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps({**config, "intermediate_size": 24}))
    status, _, err = engram("edit", "--model", tmp_path / "wide", *FACT, "--device", "cpu")
    assert status == 1 and err.splitlines()[-1].startswith(
        "Error: name_or_dir: expected 'smollm2', a directory"
    )

    def asks(*_, **__):
        raise ImportError("Loading this model requires a package (`pip install it`)")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", asks)
    status, _, err = engram("edit", "--model", folder, *FACT, "--device", "cpu")
    assert status == 1 and err.startswith("Error: name_or_dir: ") and "requires a package" in err
    assert err.count("\n") == 1
