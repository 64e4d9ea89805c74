"""What two ranks do together: one program runs all cases, as its start takes longer than each of them."""

import json
import os
import subprocess
import sys

import child
import pytest

pytest.importorskip("transformers")

import model_zoo

from distributed.cases import CASES
from engram_kernels.editing import EditResult
from engram_kernels.hf.checkpoints import save_model

RANKS = 2
RUN = "import runpy, sys; sys.argv[0] = 'cases'; runpy.run_module('distributed.cases', run_name='__main__')"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        # More threads would wait for each other.
        patch.setenv("OMP_NUM_THREADS", "1")
        processes = [child.start(RUN, folder, rank, RANKS) for rank in range(RANKS)]
    for process in processes:
        _, errors = process.communicate(timeout=600)
        sys.stderr.write(errors)
    return folder


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
@pytest.mark.parametrize("rank", range(RANKS))
def test_case(folder, case, rank):
    outcome = folder / f"{case} {rank}.json"
    assert outcome.exists(), "its rank ended before"
    failure = json.loads(outcome.read_text())
    assert not failure, failure


def test_torchrun_starts_the_command_line(tmp_path):
    """Both ranks share an edit; one of them speaks and saves it."""
    model = model_zoo.small_model("llama")
    tokenizer = model_zoo.byte_level_tokenizer()
    save_model(model, tokenizer, tmp_path / "model")
    (tmp_path / "corpus.txt").write_text("\n\n".join(model_zoo.TEXTS))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "engram_kernels.cli", "edit", "--model", tmp_path / "model",
        "--corpus", tmp_path / "corpus.txt", "--tokens", "300",
        "--subject", "The Eiffel Tower", "--prompt", "{} is located in the city of",
        "--target", "Rome", "--layer", "1", "--device", "cpu", "--save", tmp_path / "edit",
    ]  # fmt: skip
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "ENGRAM_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    command = list(map(str, command))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved to") == 1, done.stdout
    result = EditResult.from_pretrained(tmp_path / "edit")
    with result.apply(model):
        assert result.records[0].edit.target == "Rome"
