"""The tasks that tell the memories apart, and the scripts that measure them."""

import json

import continual_memory
import measure_memory_tasks
import memory_tasks as tasks
import model_zoo
import pytest
import test_time_training
import torch
import typer
from accuracy import error
from typer.testing import CliRunner

import engram_kernels as ek
from engram_kernels.hf.projection import output_projection

pytestmark = pytest.mark.usefixtures("one_thread")


def command(function):
    app = typer.Typer()
    app.command()(function)
    return app


def test_ridge_recalls_as_many_pairs_as_the_state_has_dimensions():
    shares = {rule: tasks.recall(rule, pairs=64, keys=64) for rule in tasks.RULES}
    assert shares["ridge"] >= 0.99 and shares["softmax"] >= 0.99
    assert shares["hebbian"] < shares["delta"] < 0.9


def test_regression_in_context_is_best_by_ridge():
    errors = {rule: tasks.regression(rule, pairs=128) for rule in tasks.RULES}
    assert errors["ridge"] < errors["delta"] < errors["softmax"] < errors["hebbian"]
    assert tasks.regression("ridge", pairs=256) < errors["ridge"]


def test_what_is_read_at_the_end_is_what_the_operator_reads_last():
    k, v = torch.nn.functional.normalize(torch.randn(2, 9, 6), dim=-1), torch.randn(2, 9, 4)
    for rule, function in (
        ("ridge", ek.ridge_memory),
        ("delta", ek.delta_memory),
        ("hebbian", ek.hebbian_memory),
    ):
        readouts, _ = function(*(x.unsqueeze(2) for x in (k, k, v)))
        assert error(tasks.read(rule, k[:, -1:], k, v), readouts[:, -1:, 0]) < 1e-4


def test_ridge_forgets_no_task_and_unlearns_one_pair():
    errors = {rule: tasks.continual(rule)[-1] for rule in tasks.RULES}
    assert max(errors["ridge"]) < 0.05 < 0.5 < max(errors["delta"]) < max(errors["hebbian"]) + 0.1
    found = tasks.unlearning()
    assert found["cosine of the pair before"] > 0.99 > 0.5 > abs(found["cosine of the pair after"])
    assert found["least cosine of the others after"] > 0.99 and found["state's distance"] < 1e-12


def test_queries_ask_for_every_pair_once():
    tokens, answers = tasks.queries(5, 8, 3, torch.Generator().manual_seed(0))
    assert tokens.shape == (3, 15) and answers.shape == (3, 5)
    for row, wanted in zip(tokens.tolist(), answers.tolist(), strict=True):
        pairs = dict(zip(row[0:10:2], row[1:10:2], strict=True))
        assert len(pairs) == 5 and [pairs[key] for key in row[10:]] == wanted


@pytest.mark.parametrize("rule", tasks.RULES)
def test_training_lowers_the_loss(rule):
    said = []
    options = {"words": 4, "hidden": 16, "head_dim": 4, "batch": 16}
    model = tasks.train(rule, 40, (2,), **options, progress=lambda *told: said.append(told))
    assert said[-1][1:] == (40, 40)
    first, last = (float(told[0].split()[-1]) for told in (said[0], said[-1]))
    assert last < first and 0 <= tasks.accuracy(model, 2, words=4, batch=8) <= 1


def test_the_scripts(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    files = {"plot": tmp_path / "tasks.png", "report": tmp_path / "tasks.json"}
    options = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    done = CliRunner().invoke(command(measure_memory_tasks.main), ["--steps", "1", "--seeds", "1", *options])
    assert done.exit_code == 0, done.output
    report = json.loads(files["report"].read_text())
    assert report["recall"]["ridge"]["64"] >= 0.99 and set(report["trained"]) == set(tasks.RULES)
    assert files["plot"].stat().st_size > 5000
    done = CliRunner().invoke(command(continual_memory.main), ["--seeds", "1"])
    assert done.exit_code == 0 and "hebbian" in done.output


@pytest.fixture
def model():
    return model_zoo.small_model().requires_grad_(False).float()


@pytest.mark.parametrize("rule", test_time_training.RULES)
def test_the_weight_is_put_back_and_chunks_are_scored_before_they_are_written(model, rule):
    tokens, weight = torch.arange(24) % 7, output_projection(model, 1).matrix
    before = weight.clone()
    found = test_time_training.losses(model, tokens, 1, rule, step=1.0, ridge=1.0, chunk=8)
    assert torch.equal(weight, before) and len(found) == 3
    with torch.no_grad():
        logits = model(tokens[None, :8]).logits[0, :-1]
    assert found[0] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, tokens[1:8])), rel=1e-5)


def test_a_ridge_write_moves_each_output_by_no_more_than_its_error(model):
    """`K ΔWᵀ = (λI + KKᵀ)⁻¹ KKᵀ E`: a part of the errors, and all of them without a ridge."""
    weight = torch.randn(6, 20)
    keys, errors = torch.randn(5, 20), torch.randn(5, 6)
    for ridge, least in ((1e-6, 0.999), (1.0, 0.0)):
        written = weight.clone()
        test_time_training.write(written, keys, errors, "ridge", ridge)
        moved = keys @ (written - weight).T
        assert least * errors.norm() <= moved.norm() <= 1.001 * errors.norm()
    written = weight.clone()
    test_time_training.write(written, keys, errors, "sum", 0.0)
    assert error(written, weight + errors.T @ keys) < 1e-6
