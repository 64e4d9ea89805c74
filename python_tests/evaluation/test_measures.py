"""Measures against brute force: a loop over tokens, without batches."""

from dataclasses import replace

import pytest
import torch
from model_zoo import small_model

from engram_kernels import EngramError
from engram_kernels.evaluation.measures import ASPECTS, Figures, measure

pytestmark = pytest.mark.usefixtures("one_thread")


def brute_force(model, tokenizer, prompt, answer):
    """Mean log-probability of the answer, its tokens and the likeliest, alone, by a loop over tokens."""
    prefix = tokenizer(prompt)["input_ids"]
    tokens = tokenizer(f"{prompt} {answer}")["input_ids"][len(prefix) :]
    total, likeliest = 0.0, []
    for i, token in enumerate(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([prefix + tokens[:i]])).logits[0, -1].double()
        total += (logits[token] - logits.logsumexp(0)).item()
        likeliest.append(logits.argmax().item())
    return total / len(tokens), tokens, likeliest


def share(tokens, likeliest):
    return sum(a == b for a, b in zip(tokens, likeliest, strict=True)) / len(tokens)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_measures_are_those_of_brute_force(tokenizer, cases, family):
    model = small_model(family, len(tokenizer), torch.float64)
    for case, figures in zip(cases, measure(model, tokenizer, cases, batch_size=5), strict=True):
        target, truth = case.edit.target, case.truth
        asked = {
            "efficacy": [(case.edit.prompt_text, target, truth)],
            "paraphrase": [(prompt, target, truth) for prompt in case.paraphrases],
            "locality": [(prompt, answer, target) for prompt, answer in case.neighbours],
        }
        for aspect, rows in asked.items():
            for i, (prompt, right, other) in enumerate(rows):
                mine, *tokens = brute_force(model, tokenizer, prompt, right)
                theirs, *_ = brute_force(model, tokenizer, prompt, other)
                # The logits come as fp64 and are rounded to fp32 once.
                bound = 8 * torch.finfo(torch.float32).eps * (abs(mine) + abs(theirs))
                assert abs(figures.margins[aspect][i] - (mine - theirs)) <= bound
                assert figures.shares[aspect][i] == share(*tokens)
                if aspect == "locality":
                    assert figures.neighbours[i] == tokens[1]
            assert len(figures.margins[aspect]) == len(figures.shares[aspect]) == len(rows)


def test_a_model_that_gives_all_logits(tokenizer, cases, monkeypatch):
    model = small_model("llama", len(tokenizer))
    expected, forward = measure(model, tokenizer, cases), model.forward

    def whole(input_ids, attention_mask, use_cache):
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", whole)
    for figures, other in zip(measure(model, tokenizer, cases), expected, strict=True):
        assert figures.neighbours == other.neighbours
        for aspect in ASPECTS:
            assert figures.margins[aspect] == pytest.approx(other.margins[aspect], abs=1e-5)


def test_the_measures_of_one_case():
    before = Figures(
        {"efficacy": [-1.0], "paraphrase": [1.0, -2.0, 0.0, 3.0], "locality": [0.5]},
        {"efficacy": [0.5], "paraphrase": [0.0, 1.0, 0.5, 0.5], "locality": [1.0]},
        [[1, 2, 3, 4], [5, 6]],
    )
    after = replace(before, neighbours=[[1, 2, 3, 0], [0, 6]])
    assert [before.successes(aspect) for aspect in ASPECTS] == [0, 0.5, 1]
    assert [before.accuracy(aspect) for aspect in ASPECTS] == [0.5, 0.5, 1]
    assert after.unchanged(before) == (0.75 + 0.5) / 2 and before.unchanged(before) == 1


def test_what_cannot_be_measured(tokenizer, cases):
    model = small_model("llama", len(tokenizer))
    long = replace(cases[0], paraphrases=("word " * 200,))
    with pytest.raises(
        EngramError, match=r"prompt: expected at most 128 tokens with the answer, .* got \d{3} in"
    ):
        measure(model, tokenizer, [cases[1], long])
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(EngramError, match=r"model: expected finite predictions after .*, got nan"):
        measure(model, tokenizer, cases)
