"""The command line, with a small random model on disk."""

import importlib.util
import json
import re
import shutil

import pytest
from model_zoo import TEXTS, byte_level_tokenizer, small_model

import engram_kernels as ek
from engram_kernels.cli.common import App, Layers, layers_of


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
    if importlib.util.find_spec("triton"):
        assert re.search(r"ptxas\s+\d+\.\d+", out)
    if ek.backends()["cpu"] is None:
        assert re.search(r"isa_compiled\s+baseline", out)
    # What is a claim, and not more than that.
    assert out.count("executed as PTX on a CPU; not run on a GPU") == 2


def test_edit_reports_and_saves(engram, folder, tmp_path):
    report = tmp_path / "report.json"
    status, out, err = engram(
        "edit", "--model", folder, "--corpus", folder / "corpus.txt", *FACT,
        "--paraphrase", "To see {}, go to", "--control", "The Louvre is located in",
        "--also", "You find {} in", "--weight-decay", 0,
        "--save", tmp_path / "edit", "--report", report, "--device", "cpu",
    )  # fmt: skip
    assert status == 0, err
    assert "Warning: 1 of 1 edits did not take" in err
    assert "The Louvre is located in" in out and "located in the city of Rome" in out
    content = json.loads(report.read_text())
    assert [row["kind"] for row in content["answers"]] == [
        "edited", "edited", "paraphrase", "control",
    ]  # fmt: skip
    assert content["took"] is False and len(content["reached"]) == 2
    assert content["text"] == "The Eiffel Tower is located in the city of Rome"
    # A random model has no fact to win; the probability must be measured on both sides of the write.
    assert 0 < content["probability"]["before"] != content["probability"]["after"] < 1

    from engram_kernels.editing import EditResult

    assert EditResult.from_pretrained(tmp_path / "edit").records[0].edit.target == "Rome"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edit", "report.json"]


def test_a_target_that_may_have_suffixes(engram, folder, tmp_path, monkeypatch):
    """The edit is made so, and so are the answers looked at."""
    from engram_kernels.editing import EditResult, reach

    looked, reached = [], reach.reached
    monkeypatch.setattr(reach, "reached", lambda *given: looked.extend(given[1]) or reached(*given))
    status, _, err = engram(
        "edit", "--model", folder, "--corpus", folder / "corpus.txt", *FACT, "--device", "cpu", "--suffixes",
        "--save", tmp_path / "edit",
    )  # fmt: skip
    assert status == 0, err
    assert EditResult.from_pretrained(tmp_path / "edit").records[0].edit.suffixes
    assert len(looked) == 3 and all(row.going is None for row in looked)


@pytest.mark.parametrize("option", ["--paraphrase", "--control"])
def test_what_is_asked_fits_into_the_context(engram, folder, option):
    """Whatever is edited: a text that is asked only would be read beyond what the model knows."""
    long = "the towers " * 100 + "{} is in"
    status, _, err = engram(
        "edit", "--model", folder, "--corpus", folder / "corpus.txt", *FACT, option, long, "--device", "cpu"
    )
    assert status == 1 and "Error: --prompt: expected at most 128 tokens" in err and len(err) < 300, err


@pytest.mark.parametrize("name", ["subject", "prompt", "target"])
def test_bytes_that_are_no_text_are_refused(engram, name):
    """As the system hands them on where an argument is no UTF-8."""
    fact = dict(zip(FACT[::2], FACT[1::2], strict=True))
    fact[f"--{name}"] += "\udcff"
    status, _, err = engram(
        "edit", "--model", "not/loaded", *(part for pair in fact.items() for part in pair)
    )
    assert status == 1 and err.startswith(f"Error: --{name}: expected whole characters, got '")


@pytest.mark.parametrize(
    ("option", "name", "room"),
    [("--save", "edit", 600), ("--save", "edit", 1100), ("--report", "report.json", 100)],
)
def test_a_full_disk_leaves_nothing_half_written(engram, folder, tmp_path, room_for, option, name, room):
    """The sentence names the option and the path, whichever of the files does not fit."""
    asked = ("edit", "--model", folder, "--corpus", folder / "corpus.txt", *FACT, "--device", "cpu")
    assert engram(*asked)[0] == 0  # what the cache keeps is there
    with room_for(room):
        status, _, err = engram(*asked, option, tmp_path / name)
    assert status == 1
    sentence = (
        rf"Error: {option}: expected \w+ \w* ?that can be written, got '{tmp_path / name}' \(File too large\)"
    )
    assert re.fullmatch(sentence, err.splitlines()[-1]), err
    assert not list(tmp_path.iterdir())


def test_strict_fails_when_an_answer_is_not_as_wanted(engram, folder):
    # A random model does not learn the word, so the row of the edited prompt fails.
    status, out, err = engram(
        "edit", "--model", folder, "--corpus", folder / "corpus.txt", *FACT, "--device", "cpu", "--strict",
        "--control", "In [/b]",
    )  # fmt: skip
    assert "✗" in out and "In [/b]" in out
    assert status == 3 and "\nError: --strict: " in err


def test_an_edit_in_a_chat_and_without_a_space(engram, folder, tmp_path):
    from transformers import AutoTokenizer

    # In a folder of its own: the tokenizer gets a template there.
    chat = shutil.copytree(folder, tmp_path / "chat", ignore=shutil.ignore_patterns("cache"))
    tokenizer = AutoTokenizer.from_pretrained(chat)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[A]"
    tokenizer.save_pretrained(chat)
    report = tmp_path / "report.json"
    given = ("--subject", "Rome", "--prompt", "Where is {}?", "--target", "Italy", "--device", "cpu")
    status, _, err = engram(
        "edit", "--model", chat, "--corpus", chat / "corpus.txt", *given, "--chat", "--report", report
    )
    assert status == 0, err
    assert json.loads(report.read_text())["text"] == "Where is Rome?\nItaly"
    status, _, err = engram(
        "edit", "--model", folder, "--corpus", folder / "corpus.txt", *given, "--no-space", "--report", report
    )
    assert status == 0, err
    assert json.loads(report.read_text())["text"] == "Where is Rome?Italy"
    status, _, err = engram("edit", "--model", folder, *given, "--chat")
    assert status == 1 and "a tokenizer without a chat template" in err


@pytest.mark.parametrize("command", ["", "edit", "apply", "eval", "graft", "graft localize", "memory"])
def test_the_help_cuts_nothing_in_80_columns(engram, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = engram(*command.split(), "--help")
    assert status == 0 and "--help" in out
    assert "…" not in out.replace("1, …", "") and "..." not in out.replace("[ARGS]...", "")
    assert max(map(len, out.splitlines())) <= 80


BAD = {
    "subject not in prompt": (("--prompt", "Paris is the capital of"), "--prompt: "),
    "empty target": (("--target", " "), "--target: "),
    "unknown layer": (("--layer", "99"), "--layer: expected from 0 to 3 for this model, got 99"),
    "missing corpus": (("--corpus", "no/such/file"), "--corpus: "),
    "empty corpus": (("--corpus", "/dev/null"), "--corpus: "),
    "markup in the model's name": (("--model", "[/x]"), "--model: expected 'smollm2', a directory"),
    "folder of the report": (
        ("--report", "no/such/folder/report.json"),
        "--report: expected a path in a folder",
    ),
    "folder of the edit": (("--save", "no/such/folder/edit"), "--save: expected a path in a folder"),
    "device that is not there": (("--device", "foo"), "--device: "),
    "paraphrase without subject": (("--paraphrase", "Where is it?"), "--paraphrase: expected {}"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(engram, folder, case):
    change, message = BAD[case]
    status, _, err = engram(
        "edit", "--model", folder, "--corpus", folder / "corpus.txt", *FACT, "--device", "cpu", *change
    )
    assert status == 1
    assert err.startswith("Error: ") and message in err and err.count("\n") == 1


def test_only_the_package_s_own_warnings_are_shown_and_as_sentences(monkeypatch, capsys):
    import logging
    import warnings

    from engram_kernels import cli

    def warn():
        for category, filename in (
            (UserWarning, cli.__file__),
            (UserWarning, "elsewhere.py"),
            # A library can blame its caller, which is this package.
            (FutureWarning, cli.__file__),
        ):
            warnings.warn_explicit(f"corpus: {category.__name__} of {filename}", category, filename, 7)
        logging.getLogger("transformers").warning("a library's")

    before = warnings.showwarning
    monkeypatch.setattr(cli, "app", warn)
    cli.main()
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"Warning: corpus: UserWarning of {cli.__file__}\n")
    assert warnings.showwarning is before and logging.getLogger("transformers").isEnabledFor(logging.WARNING)


def test_version(engram):
    status, out, _ = engram("--version")
    assert (status, out) == (0, f"engram_kernels {ek.__version__}\n")


def test_a_choice_that_there_is_not_is_refused_by_the_option_s_name(engram, folder):
    status, _, err = engram("edit", "--model", folder, *FACT, "--dtype", "int4")
    assert status == 2 and "--dtype" in err and "'float32', 'bfloat16', 'float16'" in err


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        ("model: expected a folder", "--model: expected a folder"),
        ("batch_size: expected 1", "--batch-size: expected 1"),
        ("other weights (force=True edits all the same)", "other weights (--force edits all the same)"),
        ("facts: expected mean=True", "facts: expected mean=True"),
        ("other weights (overwrite=True takes them)", "other weights"),
        ("revert later ones first, or give force=True", "revert later ones first, or give --force"),
        ("revert later ones first, or give overwrite=True", "revert later ones first"),
        ("layer: expected a number", "--layer: expected a number"),
        ("layers: expected numbers", "--layer: expected numbers"),
    ],
)
def test_errors_name_options_and_not_arguments(capsys, error, shown):
    app = App()

    @app.command()
    def fail(
        facts: str, model: str = "", batch_size: int = 1, force: bool = False, layers: Layers = None
    ) -> None:
        raise ek.EngramError(error)

    with pytest.raises(SystemExit) as ended:
        app(["some"])
    assert ended.value.code == 1 and capsys.readouterr().err == f"Error: {shown}\n"


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        (None, None),
        (["3"], [3]),
        (["4", "5"], [4, 5]),
        (["4,5, 7"], [4, 5, 7]),
        (["4-6", "9"], [4, 5, 6, 9]),
    ],
)
def test_layers_can_be_said_in_any_way(given, layers):
    assert layers_of(given) == layers


@pytest.mark.parametrize("given", ["", "x", "4-", "-1", "6-4", "4,,5", "1.5"])
def test_what_is_no_layer_is_refused(given):
    with pytest.raises(ValueError, match="layers: expected numbers such as 5, or 4,5,6, or 4-6, got "):
        layers_of([given])


def test_several_layers_by_memit(engram, folder, tmp_path):
    status, out, err = engram(
        "edit", "--model", folder, "--corpus", folder / "corpus.txt", *FACT, "--device", "cpu",
        "--method", "memit", "--layers", "1-2", "--json",
    )  # fmt: skip
    assert status == 0, err
    found = json.loads(out)
    assert (found["method"], len(found["modules"]), found["took"]) == ("memit", 2, False)
    assert [name.split(".")[2] for name in found["modules"]] == ["1", "2"]


def test_checkpoints_that_cannot_be_read_are_one_sentence(engram, folder, tmp_path, monkeypatch):
    import shutil

    import transformers

    shutil.copytree(folder, tmp_path / "wide", ignore=shutil.ignore_patterns("cache"))
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps({**config, "intermediate_size": 24}))
    status, _, err = engram("edit", "--model", tmp_path / "wide", *FACT, "--device", "cpu")
    assert status == 1 and err.splitlines()[-1].startswith("Error: --model: expected 'smollm2', a directory")

    def asks(*_, **__):
        raise ImportError("Loading this model requires a package (`pip install it`)")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", asks)
    status, _, err = engram("edit", "--model", folder, *FACT, "--device", "cpu")
    assert status == 1 and err.startswith("Error: --model: ") and "requires a package" in err
    assert err.count("\n") == 1
