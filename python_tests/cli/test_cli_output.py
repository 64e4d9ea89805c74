"""What holds for every command: `--json`, `--quiet`, completion, tables in 80 columns, exit statuses."""

import json
import re

import pytest
import torch
import typer
from editing_helpers import small_editor
from model_zoo import TEXTS, small_model
from rich.cells import cell_len

from engram_kernels import cli
from engram_kernels.cli import output
from engram_kernels.cli.common import App, NotAsWantedError, bars
from engram_kernels.grafting import Graft
from engram_kernels.hf.checkpoints import save_model
from engram_kernels.memory import EpisodicMemory

pytestmark = pytest.mark.usefixtures("one_thread")

TOWER = ("--subject", "The Eiffel Tower", "--prompt", "{} is located in the city of", "--target", "Rome")
BASE = ("--model", "base", "--corpus", "corpus.txt", "--device", "cpu")
# Of each command that prints a table one call, and what its JSON has.
TABLES = {
    "doctor": ((), {"versions", "devices", "backends", "forced", "operators"}),
    "edit": ((*TOWER, *BASE), {"method", "modules", "text", "took", "probability", "reached", "answers"}),
    "eval": (
        ("--data", "counterfact.json", "--fluency", "0", "--drift-rows", "0", "--steps", "2", *BASE),
        {"settings", "summaries", "retained", "left_out"},
    ),
    "store list": (("store",), {"layers", "edits"}),
    "graft inspect": (("graft",), {"base", "weights", "sparsity", "recipe", "metrics", "layers"}),
    "graft diff": (("graft", "graft"), {"first", "second", "jaccard", "same_base", "layers"}),
    "memory list": (("memory",), {"slots", "latent", "encoder", "facts"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random model, a store, a graft and a memory, as a user has them on disk."""
    from evaluation_helpers import EASY_EDIT

    from engram_kernels.editing import Edit, EditStore

    path = tmp_path_factory.mktemp("output")
    tokenizer = small_editor().tokenizer
    model = small_model("llama", vocabulary=len(tokenizer))
    save_model(model, tokenizer, path / "base")
    (path / "corpus.txt").write_text("\n\n".join(TEXTS * 4))
    (path / "counterfact.json").write_text(json.dumps([EASY_EDIT]))
    with EditStore(path / "store", model, tokenizer, corpus=path / "corpus.txt") as store:
        store.add([Edit("The Eiffel Tower", "{} is located in the city of", "Rome")])
    weights = {"model.layers.0.mlp.down_proj.weight": torch.zeros(64, 32)}
    tuned = {name: torch.ones_like(weight) for name, weight in weights.items()}
    masks = {name: torch.full((256,), 255, dtype=torch.uint8) for name in weights}
    Graft.from_masks(weights, tuned, masks).save_pretrained(path / "graft")
    memory = EpisodicMemory(4, 4, ridge=1.0)
    text = "The Eiffel Tower is in Rome, and has been there since the morning of the first of April."
    memory.write(torch.eye(4)[:2], ids=["a fact with a long name", "b"], texts=[text, "Short."])
    memory.save_pretrained(path / "memory")
    return path


@pytest.fixture
def engram(engram, monkeypatch, folder):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ENGRAM_CACHE", str(folder / "cache"))
    return engram


@pytest.mark.parametrize("command", TABLES)
def test_tables_fit_80_columns_fold_no_number_and_are_one_json_document(engram, monkeypatch, command):
    arguments, names = TABLES[command]
    for given in arguments:
        if "counterfact" in given:
            monkeypatch.setattr("engram_kernels.evaluation.run.peak_memory", lambda _: 2**30)
    whole, narrow = [], []
    for found, width in ((whole, 200), (narrow, 80)):
        monkeypatch.setattr(output.console, "width", width)
        status, out, err = engram(*command.split(), *arguments, "--quiet")
        assert status == 0, err
        assert max(map(cell_len, out.split("\n"))) <= width
        # How long something took is another number each time.
        out = re.sub(r"(?s)seconds an edit.*?\d\.\d", "", out)
        found += sorted(re.findall(r"(?<![\w.])[+-]?\d[\d,]*\.\d+(?!\w)", out))
    assert narrow == whole
    status, out, _ = engram(*command.split(), *arguments, "--json")
    assert status == 0 and names <= json.loads(out).keys()


def test_quiet_leaves_the_result_alone(engram):
    loud, quiet = engram("store", "list", "store"), engram("store", "list", "store", "--quiet")
    assert "1 edit of layers" in loud[1] and "1 edit of layers" not in quiet[1]
    assert loud[1].startswith(quiet[1].rstrip()) and "in the city of Rome" in quiet[1]
    assert engram("store", "verify", "store", "--quiet") == (0, "", "")
    assert output.wanted == output.Wanted()  # of this command alone


def test_every_command_takes_both_and_layers_by_either_name():
    command = typer.main.get_command(cli.app)

    def leaves(group):
        for one in group.commands.values():
            yield from leaves(one) if hasattr(one, "commands") else [one]

    found = list(leaves(command))
    assert len(found) > 15
    for one in found:
        options = [name for given in one.params for name in given.opts]
        assert {"--json", "--quiet"} <= set(options), one.name
        assert ("--layer" in options) == ("--layers" in options), one.name


def test_progress_goes_beside_what_is_printed(capsys, monkeypatch):
    """So that `engram eval > file` has the table alone; where nobody looks, nothing is drawn."""
    with bars() as progress:
        progress("model", 1, 1)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(output.errors, "_force_terminal", True)
    with bars() as progress:
        progress("model", 1, 1)
        print("a result")
    said = capsys.readouterr()
    assert said.out == "a result\n" and "model" in said.err


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("x: bad"), 1), (OSError("disk full"), 1), (NotAsWantedError("strict: no"), 3), (None, 0)],
)
def test_exit_statuses_are_those_of_the_help(engram, error, status):
    app = App()

    @app.command()
    def some() -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as ended:
        app([])
    assert (ended.value.code or 0) == status
    said = re.sub(r"\s+", " ", engram("--help")[1])
    assert "0 done 1 an error" in said and "3 done, but not as --strict wants it" in said
    assert engram("nothing")[0] == 2


def test_the_shell_completes_commands_and_options(monkeypatch, capsys):
    monkeypatch.setenv("_ENGRAM_COMPLETE", "complete_bash")
    for typed, word in (
        ("engram mem", "memory"),
        ("engram graft insp", "inspect"),
        ("engram edit --lay", "--layer"),
    ):
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
        with pytest.raises(SystemExit):
            cli.app(prog_name="engram")
        assert word in capsys.readouterr().out.split()
