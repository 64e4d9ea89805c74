"""Scores, thresholds, and answers from memory or from the bare decoder."""

import pytest
import torch
from larimar_helpers import FACTS, LATENT, encode, scoped_model

from engram_kernels.larimar import ScopeDetector
from engram_kernels.larimar.scope import key_scores, stored_keys
from engram_kernels.memory import EpisodicMemory


def test_scores():
    queries, keys = torch.randn(4, LATENT), torch.randn(3, LATENT)
    expected = [
        max(torch.dot(q, k).item() / (q.norm().item() * k.norm().item()) for k in keys) for q in queries
    ]
    torch.testing.assert_close(key_scores(queries, keys), torch.tensor(expected))
    assert key_scores(queries, keys[:0]).tolist() == [-1.0] * 4
    # In the queries' dtype, whatever the memory's.
    torch.testing.assert_close(key_scores(queries, keys.double()), torch.tensor(expected))
    memory = EpisodicMemory(32, LATENT)
    memory.write(keys, ids=list("abc"))
    torch.testing.assert_close(stored_keys(memory).float(), keys)
    assert stored_keys(EpisodicMemory(32, LATENT)).shape == (0, LATENT)


def test_calibration_is_the_best_threshold():
    inside, outside = torch.rand(40) + 0.3, torch.rand(60)
    detector = ScopeDetector.calibrate(inside, outside)

    def right(threshold):
        return (inside >= threshold).float().mean() + (outside < threshold).float().mean()

    assert right(detector.threshold) >= max(right(t) for t in torch.linspace(-0.5, 2, 2001)) - 1e-6
    apart = ScopeDetector.calibrate(torch.tensor([0.9, 0.8]), torch.tensor([0.2, 0.5]))
    assert apart.threshold == pytest.approx(0.65)
    assert apart(torch.tensor([0.64, 0.66])).tolist() == [False, True]
    assert ScopeDetector(0.5)(torch.tensor([0.4375, 0.5])).tolist() == [False, True]
    # Two thresholds that tell three of four right: the one in the wider gap.
    for inside, outside, expected in (
        ([0.2, 0.9], [0.1, 0.6], 0.75),
        ([0.4, 0.9], [0.1, 0.8], 0.25),
    ):
        found = ScopeDetector.calibrate(torch.tensor(inside), torch.tensor(outside))
        assert found.threshold == pytest.approx(expected)


def test_scores_that_are_no_numbers_are_refused():
    scores = torch.rand(4)
    with pytest.raises(ValueError, match=r"^outside: expected some scores, got none"):
        ScopeDetector.calibrate(scores, scores[:0])
    for arguments, name in (((scores * torch.nan, scores), "inside"), ((scores, scores / 0), "outside")):
        with pytest.raises(ValueError, match=rf"^{name}: expected finite values, got 4"):
            ScopeDetector.calibrate(*arguments)
    with pytest.raises(TypeError, match=r"^threshold: expected a number, got str$"):
        ScopeDetector("0.5")


def test_answers_from_memory_and_from_the_bare_decoder():
    scoped = scoped_model()
    model, tokenizer = scoped.model, scoped.tokenizer
    prompts = [fact.prompt for fact in FACTS]

    def said(text, readout):
        ids = tokenizer([text], return_tensors="pt")["input_ids"]
        options = {"max_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
        written = model.generate(ids, attention_mask=torch.ones_like(ids), readout=readout, **options)
        return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)

    bare = [said(prompt, None) for prompt in prompts]
    assert scoped.answer(prompts, max_new_tokens=5) == bare  # nothing is written
    assert scoped.write(prompts[:2], ["Rome", "Paris"]) == prompts[:2]
    assert model.memory.ledger[prompts[1]].text == f"{prompts[1]} Paris"
    assert scoped.in_scope(prompts) == [True, True, False, False, False]
    readouts = model.read(encode(prompts))
    expected = [said(prompts[i], readouts[i : i + 1]) for i in range(2)] + bare[2:]
    assert scoped.answer(prompts, max_new_tokens=5) == expected
    assert expected[:2] != bare[:2]
    model.decoder.generation_config.update(do_sample=True, temperature=100.0)
    assert scoped.answer(iter(prompts), max_new_tokens=5) == expected  # greedy, unless asked otherwise
    scoped.forget([prompts[0]])
    assert scoped.answer(prompts[:1], max_new_tokens=5) == bare[:1]
    scoped.forget([prompts[1]])
    assert scoped.answer(prompts, max_new_tokens=5) == bare
    assert scoped.write(prompts[:1], ["Rome"], ids=["a name"]) == ["a name"]
    scoped.forget(["a name"])
    with pytest.raises(ValueError, match="targets: expected 2, one a prompt, got 1"):
        scoped.write(prompts[:2], ["Rome"])


def test_one_text_in_place_of_a_list_is_refused():
    """It would be answered letter by letter."""
    larimar = scoped_model()
    for name, act in (
        ("prompts", lambda: larimar.answer("Where?")),
        ("prompts", lambda: larimar.write("abc", ["x"] * 3)),
        ("targets", lambda: larimar.write(["a", "b", "c"], "abc")),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected a list of texts, got one text$"):
            act()
    assert not larimar.model.memory.ids
