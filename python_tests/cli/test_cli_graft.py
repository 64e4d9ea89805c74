"""`engram graft`, with small random models on disk."""

import copy
import io
import json
import shutil
from functools import partial

import pytest
import torch
from command_line import refused
from defaults import DEFAULTS
from model_zoo import TEXTS, byte_level_tokenizer, small_model
from rich.console import Console

from engram_kernels.cli.examples import lines
from engram_kernels.grafting import Graft, graftable_parameters, plots

pytestmark = pytest.mark.usefixtures("one_thread")

LABELLED = "\n".join(f"{i % 2} {text}" for i, text in enumerate(TEXTS)) + "\n\n"
WORDS = ("--template", "Text: {} It was", "--word", "a", "--word", "b")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base and its fine-tuned sister, rows with labels, documents, and a graft, as a user has them."""
    path = tmp_path_factory.mktemp("graft")
    tokenizer = byte_level_tokenizer()
    base = small_model("llama", vocabulary=len(tokenizer))
    tuned, generator = copy.deepcopy(base), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    base.save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    tuned.save_pretrained(path / "tuned")
    small_model("gpt2", vocabulary=len(tokenizer)).save_pretrained(path / "gpt2")
    (path / "rows").write_text(LABELLED)
    (path / "rows.latin").write_bytes("0 caf\xe9\x85 it is\n1 the tower\n".encode("latin-1"))
    (path / "bad rows").write_text("0 fine\n2 no such label\n")
    (path / "documents").write_text("\n".join(TEXTS))
    for name, seed in (("graft", 1), ("other", 2)):
        made(base, tuned, seed).save_pretrained(path / name)
    return path


def made(base, tuned, seed, count=300):
    """A graft at random positions of two layers."""
    generator = torch.Generator().manual_seed(seed)
    pre = {name: p.detach() for name, p in graftable_parameters(base).items()}
    ft = {name: tuned.get_parameter(name).detach() * seed for name in pre}
    masks = {}
    for name, weight in pre.items():
        mask = torch.zeros(-(-weight.numel() // 8), dtype=torch.uint8)
        if ".1.mlp." in name or ".2." in name:
            mask[torch.randperm(len(mask), generator=generator)[: count // 10]] = 1
        masks[name] = mask
    return Graft.from_masks(pre, ft, masks, recipe={"name": "[b]random"}, metrics={"grafted": {"ece": 0.25}})


@pytest.fixture
def engram(engram, monkeypatch, folder):
    monkeypatch.chdir(folder)
    return partial(engram, "graft")


LEARN = ("--base", "base", "--tuned", "tuned", "--data", "rows", "--device", "cpu", "--batch-size", "8")


def test_a_fine_tuned_model_may_have_more_tokens(engram, tmp_path):
    """Such as one for padding."""
    from transformers import AutoModelForCausalLM

    more = AutoModelForCausalLM.from_pretrained("tuned")
    more.resize_token_embeddings(more.config.vocab_size + 3, mean_resizing=False)
    more.save_pretrained(tmp_path / "more")
    grafts = []
    for i, tuned in enumerate(("tuned", tmp_path / "more")):
        out = ("--out", tmp_path / str(i), "--recipe", "largest", "--test", "rows", "--sparsity", "1e-3")
        status, printed, _ = engram("localize", *LEARN, *WORDS, *out, "--tuned", tuned)
        assert status == 0
        grafts.append(Graft.from_pretrained(tmp_path / str(i)))
    assert "The fine-tuned model has 3 tokens more than the base, which are left out." in printed
    assert grafts[0].overlap(grafts[1]).jaccard == 1 and grafts[0].metrics == grafts[1].metrics


def test_localize_learns_tests_and_saves(engram, tmp_path):
    out, picture = tmp_path / "skill", tmp_path / "skill.png"
    status, printed, err = engram(
        "localize", *LEARN, *WORDS, "--out", out, "--sparsity", "1e-3", "--test", "rows", "--shots", "4",
        "--heat-map", picture, "--exclude", "*norm*",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "The fine-tuned model also changed 'model.embed_tokens.weight'" in " ".join(printed.split())
    for word in ("learn", "loss", "fine-tuned", "accuracy", "ECE", "Saved"):
        assert word in printed
    graft = Graft.from_pretrained(out)
    total = sum(torch.Size(shape).numel() for shape in graft.shapes.values())
    assert graft.size == round(1e-3 * total) and not any("norm" in name for name in graft.shapes)
    assert graft.base_model == "base" and graft.recipe["seed"] == 0
    for name in ("pre", "fine-tuned", "grafted"):
        assert graft.metrics[name].keys() == {"accuracy", "ece", "loss", "rows"}
        assert graft.metrics[name]["rows"] == len(TEXTS)
    assert graft.metrics["words"] == ["a", "b"]
    assert graft.metrics["pre"]["loss"] != graft.metrics["fine-tuned"]["loss"]
    assert graft.metrics["pre"]["loss"] != graft.metrics["grafted"]["loss"]
    assert {path.name for path in tmp_path.iterdir()} == {"skill", "skill.png"}


def test_the_fine_tuned_accuracy_is_the_fine_tuned_models(engram, folder, tmp_path):
    """It is measured in the base's modules; the model loaded on its own must answer alike."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from engram_kernels.grafting import PromptTask, classification_score

    status, _, err = engram(
        "localize", *LEARN, *WORDS, "--out", tmp_path / "skill", "--sparsity", "1", "--test", "rows"
    )
    assert status == 0, err
    task = PromptTask(AutoTokenizer.from_pretrained(folder / "base"), "Text: {} It was", ["a", "b"])
    rows = [(i % 2, text) for i, text in enumerate(TEXTS)]
    model = AutoModelForCausalLM.from_pretrained(folder / "tuned", dtype=torch.float32).eval()
    expected = classification_score(model, task.batches(rows, 8), task.logits)
    metrics = Graft.from_pretrained(tmp_path / "skill").metrics
    assert metrics["fine-tuned"]["accuracy"] == expected.accuracy
    assert metrics["fine-tuned"]["loss"] == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.parametrize("recipe", ["rounds", "panigrahi"])
def test_localize_on_documents(engram, tmp_path, recipe):
    status, _, err = engram(
        "localize", *LEARN, "--data", "documents", "--out", tmp_path / "skill", "--recipe", recipe,
        "--steps", "5", "--accumulate", "2", "--sparsity", "1e-3", "--dtype", "bfloat16",
    )  # fmt: skip
    assert (status, err) == (0, "")
    graft = Graft.from_pretrained(tmp_path / "skill")
    assert graft.size and graft.metrics.keys() == {"first_loss", "last_loss", "changed_outside"}
    assert graft.recipe["steps"] == 5 and graft.recipe["accumulate"] == 2
    # The fine-tuned folder is float32: it is read in the base's dtype.
    assert {values.dtype for values in graft.values.values()} == {torch.bfloat16}


def test_localize_refits_the_values(engram, tmp_path):
    graft = {}
    for name, change in (("largest", ()), ("refitted", ("--refit", "3"))):
        out = tmp_path / name
        status, _, err = engram(
            "localize", *LEARN, *WORDS, "--out", out, "--recipe", "largest", "--sparsity", "1e-3", *change
        )
        assert (status, err) == (0, "")
        graft[name] = Graft.from_pretrained(out)
    assert graft["refitted"].overlap(graft["largest"]).jaccard == 1
    assert graft["refitted"].recipe["refit"]["steps"] == 3 and graft["refitted"].recipe["name"] == "largest"
    assert {"first_loss", "last_loss"} <= graft["refitted"].metrics.keys()
    assert any(
        not torch.equal(values, graft["largest"].values[name])
        for name, values in graft["refitted"].values.items()
    )


@pytest.mark.parametrize("default", DEFAULTS)
def test_random_weights_do_not_depend_on_defaults(folder, default):
    from engram_kernels.cli.examples import Examples
    from engram_kernels.cli.trial import Trial

    examples = Examples.read(folder / "documents", None, None, None, None, 0)
    made = (str(folder / "base"), str(folder / "tuned"), examples, torch.float32, "cpu", 8, 64, 3)
    expected = Trial(*made).chosen(0.01, "random")
    trial = Trial(*made)
    with DEFAULTS[default]():
        found = trial.chosen(0.01, "random")
    assert all(torch.equal(found.indices[name], at) for name, at in expected.indices.items())


def test_latin_1_rows(engram, tmp_path):
    status, _, err = engram(
        "localize", *LEARN, *WORDS, "--data", "rows.latin", "--out", tmp_path / "skill", "--sparsity", "1e-3"
    )
    assert (status, err) == (0, "")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_lines_of_a_file_in_the_encoding_that_it_names(tmp_path, encoding):
    (tmp_path / "rows").write_bytes("0 ein Café 👩\r\n\r\n1 מגדל\r\n".encode(encoding))
    assert lines("data", tmp_path / "rows") == [(1, "0 ein Café 👩"), (3, "1 מגדל")]


def test_lines_of_a_file_that_names_no_encoding(tmp_path):
    (tmp_path / "rows").write_bytes("0 one\n1 two\n".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"^data: expected a text file, .* zero in line 1; is it UTF-16"):
        lines("data", tmp_path / "rows")


def test_documents_are_padded_without_labels():
    from engram_kernels.cli.examples import document_batches

    batches = document_batches(byte_level_tokenizer(), ["x", "short one", "a longer one of them"], 2, 9, 0)
    assert len(batches) == 1 and batches[0]["input_ids"].shape == (2, 9)
    ids, mask, labels = (batches[0][key] for key in ("input_ids", "attention_mask", "labels"))
    assert torch.equal(labels == -100, mask == 0) and torch.equal(labels[mask == 1], ids[mask == 1])
    assert mask.sum(1).tolist() == [len(byte_level_tokenizer()("short one")["input_ids"]), 9]


def test_apply_saves_the_grafted_model(engram, folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    status, _, err = engram("apply", "--base", "base", "--graft", "graft", "--out", tmp_path / "model")
    assert status == 0, err
    load = AutoModelForCausalLM.from_pretrained
    base, grafted = load(folder / "base"), load(tmp_path / "model")
    Graft.from_pretrained(folder / "graft").apply(base)
    for name, weight in base.state_dict().items():
        assert torch.equal(weight, grafted.state_dict()[name]), name
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("The")["input_ids"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_apply_refuses_another_base_unless_forced(engram, tmp_path):
    # The fine-tuned weights with the base's tokenizer: a model of the same shapes.
    arguments = ("apply", "--base", "wrong", "--graft", "graft", "--out", tmp_path / "model")

    shutil.copytree("base", "wrong", dirs_exist_ok=True)
    shutil.copy("tuned/model.safetensors", "wrong/model.safetensors")
    status, _, err = engram(*arguments)
    assert status == 1 and "the weights that the graft was made for" in err and not any(tmp_path.iterdir())
    assert "(--force grafts them all the same)" in " ".join(err.split()) and "force=True" not in err
    status, _, err = engram(*arguments, "--force")
    assert status == 0, err


def test_inspect(engram, folder, tmp_path):
    graft = Graft.from_pretrained(folder / "graft")
    status, out, err = engram("inspect", "graft", "--heat-map", tmp_path / "x.png")
    assert (status, err) == (0, "")
    for word in (f"{graft.size:,}", "[b]random", "ece 0.25", "down_proj", "not named", "·"):
        assert word in out
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_no_number_is_folded_in_a_narrow_terminal():
    from engram_kernels.cli.graft import _density
    from engram_kernels.grafting.graft import Density

    kinds = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    kinds += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    kinds += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    entries = (10**7, 1234567, 99999, 12300, 150, 15, 0, 5 * 10**6, 25 * 10**5)
    rows = [Density(29, kind, count, 10**7) for kind, count in zip(kinds, entries, strict=True)]
    console = Console(width=80, file=io.StringIO())
    console.print(_density(plots.Grid.of(rows)))
    *_, last = console.file.getvalue().strip().splitlines()
    assert last.split() == [
        "29", "1000k", "123k", "10k", "1230", "15", "1.5", "·", "500k", "250k", f"{sum(entries):,}"
    ]  # fmt: skip


def test_diff(engram, folder):
    one, two = (Graft.from_pretrained(folder / name) for name in ("graft", "other"))
    overlap = one.overlap(two)
    status, out, err = engram("diff", "graft", "other")
    assert (status, err) == (0, "") and overlap.shared > 0
    squeezed = " ".join(out.replace("│", " ").split())
    # The second graft's values are twice the first one's: at every shared position another value.
    assert f"set by both {overlap.shared:,} of these, to other values {overlap.shared:,}" in squeezed
    assert f"{overlap.jaccard:.4f}" in squeezed and "bases the same" in squeezed
    status, out, _ = engram("diff", "graft", "graft")
    assert status == 0 and "1.0000" in out and "of these, to other values 0 " in " ".join(out.split())


def test_curve(engram, tmp_path):
    out, report = tmp_path / "curve.png", tmp_path / "curve.json"
    status, printed, err = engram(
        "curve", *LEARN, *WORDS, "--test", "rows", "--out", out, "--report", report, "--baselines",
        "--sparsity", "1e-2", "--sparsity", "1e-3", "--shots", "4",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "0.1 %" in printed and "largest changes" in printed and out.stat().st_size > 5000
    content = json.loads(report.read_text())
    got = [(row["series"], row["sparsity"]) for row in content["grafts"]]
    assert got == [(name, size) for size in (1e-2, 1e-3) for name in ("learned", "largest changes", "random")]
    assert len({row["entries"] for row in content["grafts"] if row["sparsity"] == 1e-3}) == 1
    assert content["pre"]["rows"] == len(TEXTS) and "fine-tuned" in content
    assert {path.name for path in tmp_path.iterdir()} == {"curve.png", "curve.json"}


BAD = {
    "missing base": (("--base", "no/such/base"), "--base: expected 'smollm2'"),
    "missing fine-tuned model": (("--tuned", "no/such/model"), "--tuned: expected 'smollm2'"),
    "another architecture": (("--tuned", "gpt2"), "--tuned: expected a tensor"),
    "missing data": (("--data", "none"), "--data: expected a text file"),
    "empty data": (("--data", "/dev/null"), "--data: expected lines of text"),
    "no text": (("--data", "base/model.safetensors"), "--data: expected a text file, got 'base/model.saf"),
    "label outside": (("--data", "bad rows"), "--data: expected a label from 0 to 1 and a text in line 2"),
    "missing test": (("--test", "none"), "--test: expected a text file"),
    "template without a place": (("--template", "Review:"), "--template: expected one {}"),
    "equal words": (("--word", "a"), "--word: expected two or more different"),
    "word of several tokens": (("--word", "zqxj"), "words: expected words of one token"),
    "zero sparsity": (("--sparsity", "0"), "--sparsity: expected at most 1, and at least one of"),
    "tiny sparsity": (("--sparsity", "1e-9"), "--sparsity: expected at most 1, and at least one of"),
    "sparsity above one": (("--sparsity", "1.5"), "--sparsity: "),
    "sparsity that is no number": (("--sparsity", "nan"), "--sparsity: "),
    "unknown recipe": (("--recipe", "soup"), "--recipe: expected one of rounds"),
    "too few steps": (("--steps", "1"), "--steps: "),
    "learning rate": (("--lr", "nan"), "--lr: "),
    "l1": (("--l1", "inf"), "--l1: "),
    "pattern to include": (("--include", "x*"), "--include: expected a pattern that matches"),
    "pattern to exclude": (("--exclude", "x*"), "--exclude: expected a pattern that matches"),
    "batch size": (("--batch-size", "0"), "--batch-size: expected at least 1"),
    "refit": (("--refit", "0"), "--refit: expected at least 1"),
    "max length": (("--max-length", "0"), "--max-length: expected at least 1"),
    "accumulate": (("--accumulate", "0"), "--accumulate: expected at least 1"),
    "too many shots": (("--shots", "99"), "--shots: expected from 1 to the 10 rows that label 0 has"),
    "no shots": (("--shots", "0"), "--shots: expected from 1"),
    "device": (("--device", "foo"), "--device: expected one that PyTorch can use"),
}
PICTURES = {
    "not a png": ("curve.svg", "expected a name that ends in .png"),
    "no such folder": ("no/such/x.png", "expected a path in a folder that can be written"),
    "a folder": ("folder.png", "expected the name of a file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(engram, tmp_path, case):
    change, message = BAD[case]
    refused(engram("localize", *LEARN, *WORDS, "--out", tmp_path / "skill", *change), message)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("case", PICTURES)
def test_bad_picture_paths(engram, tmp_path, case):
    name, message = PICTURES[case]
    (tmp_path / "folder.png").mkdir()
    picture = tmp_path / name
    localize = ("localize", *LEARN, *WORDS, "--out", tmp_path / "skill", "--heat-map", picture)
    refused(engram(*localize), f"--heat-map: {message}")
    refused(engram("inspect", "graft", "--heat-map", picture), f"--heat-map: {message}")
    refused(engram("curve", *LEARN, *WORDS, "--test", "rows", "--out", picture), f"--out: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_outputs_are_checked_before_any_work(engram, tmp_path, monkeypatch):
    monkeypatch.setattr("engram_kernels.hf.loading.load_model", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    localize = ("localize", *LEARN, *WORDS, "--out")
    apply = ("apply", "--base", "base", "--graft", "graft", "--out")
    for command in (localize, apply):
        refused(engram(*command, tmp_path / "full"), "--out: expected a new or empty folder")
        refused(engram(*command, tmp_path / "full" / "file"), "--out: expected a new or empty folder")
        refused(
            engram(*command, tmp_path / "a" / "b"), "--out: expected a path in a folder that can be written"
        )
    curve = ("curve", *LEARN, *WORDS, "--test", "rows", "--out", tmp_path / "x.png")
    refused(engram(*curve, "--report", tmp_path / "a" / "b"), "--report: expected a path in a folder")
    refused(engram(*curve, "--report", tmp_path), "--report: expected the name of a file")


def test_what_needs_words_says_so(engram, tmp_path):
    for change in (("--template", "{}"), ("--shots", "2"), ("--test", "rows")):
        result = engram("localize", *LEARN, "--out", tmp_path / "skill", *change)
        refused(result, f"{change[0]}: expected a --word for each label with it")
    result = engram("localize", *LEARN, "--out", tmp_path / "skill", "--word", "a", "--word", "b")
    refused(result, "--template: expected one {} for the text, got None")


def test_what_is_no_graft_is_refused(engram, folder, tmp_path):
    message = ": expected a saved graft"
    for command, name in ((("inspect", "base"), "graft"), (("diff", "graft", "base"), "second")):
        refused(engram(*command), name + message)
    refused(
        engram("apply", "--base", "base", "--graft", "base", "--out", tmp_path / "m"), "--graft" + message
    )
    refused(
        engram("apply", "--graft", "graft", "--out", tmp_path / "model"),
        "--base: expected a model, as 'graft' does not name its own",
    )
    assert not any(tmp_path.iterdir())


def test_grafts_of_two_architectures_do_not_compare(engram, folder):
    graft = Graft.from_pretrained(folder / "graft")
    name = next(iter(graft.indices))
    graft.shapes[name] = (*graft.shapes[name], 1)
    graft.save_pretrained(folder / "turned")
    refused(engram("diff", "graft", "turned"), "second: expected a graft of the first one's architecture")


def test_a_failed_save_leaves_nothing(engram, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fail)
    status, _, err = engram("apply", "--base", "base", "--graft", "graft", "--out", tmp_path / "model")
    assert status == 1 and "No space left on device" in err and not any(tmp_path.iterdir())
    monkeypatch.setattr(plots, "heat_map", fail)
    status, _, err = engram("inspect", "graft", "--heat-map", tmp_path / "x.png")
    assert status == 1 and "No space left on device" in err and not any(tmp_path.iterdir())
