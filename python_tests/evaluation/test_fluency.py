"""Fluency: the entropy of known texts, and generated ones against a loop without batch or cache."""

import math
import random

import pytest
import torch
from defaults import DEFAULTS
from model_zoo import small_model, word_piece_tokenizer

from engram_kernels import EngramError
from engram_kernels.evaluation.fluency import fluency, generate, ngram_entropy

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_entropy_of_known_texts():
    # Bigrams: "a b" three times, "b a" twice; trigrams: "a b a" and "b a b" twice each.
    bigrams = -(0.6 * math.log2(0.6) + 0.4 * math.log2(0.4))
    assert ngram_entropy("a b a b a b") == pytest.approx((2 / 3 * bigrams + 4 / 3 * 1) / 2)
    # Eight different words and marks: seven bigrams, six trigrams.
    text = "One, two; three: four five"
    assert ngram_entropy(text) == pytest.approx((2 / 3 * math.log2(7) + 4 / 3 * math.log2(6)) / 2)
    assert ngram_entropy("no no no no no") == ngram_entropy("word") == ngram_entropy("") == 0


def written_alone(model, tokenizer, prompt, ids, tokens, seed):
    """The same text with neither a batch nor a cache."""
    draws, ids = random.Random(f"{seed} {prompt}"), list(ids)
    for _ in range(tokens):
        with torch.no_grad():
            top = model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().topk(5)
        chances, draw = top.values.softmax(-1).tolist(), draws.random()
        choice = 0
        while choice < 4 and draw > sum(chances[: choice + 1]):
            choice += 1
        ids.append(top.indices[choice].item())
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generated_texts_are_those_of_brute_force(tokenizer, family):
    model = small_model(family, len(tokenizer), torch.float64)
    prompts = ["The", "The Eiffel Tower is located in the city of", "Rome is", "Therefore I think that you"]
    states = random.getstate(), torch.get_rng_state()
    texts = generate(model, tokenizer, prompts, 12, seed=3, batch_size=3)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert texts == [
        written_alone(model, tokenizer, prompt, tokenizer(prompt)["input_ids"], 12, 3) for prompt in prompts
    ]
    with DEFAULTS["another device"]():
        assert texts == generate(model, tokenizer, prompts, 12, seed=3, batch_size=1)
    other = generate(model, tokenizer, prompts, 12, seed=4)
    assert all(a != b for a, b in zip(texts, other, strict=True))


def test_fluency_is_the_mean_over_the_prompts(tokenizer, cases):
    model = small_model("llama", len(tokenizer), torch.float64)
    found = fluency(model, tokenizer, cases, 10)
    for case, bits in zip(cases, found, strict=True):
        prompts = case.generation or [case.edit.prompt_text]
        texts = [
            written_alone(model, tokenizer, prompt, tokenizer(prompt)["input_ids"], 10, 0)
            for prompt in prompts
        ]
        assert bits == pytest.approx(sum(map(ngram_entropy, texts)) / len(texts)) and bits > 0
    with pytest.raises(
        EngramError, match=r"prompt: expected at most 128 tokens with the 125 to write, .* got \d+"
    ):
        fluency(model, tokenizer, cases, 125)


def test_a_closing_token_is_not_read():
    tokenizer = word_piece_tokenizer()
    model = small_model("llama", len(tokenizer), torch.float64)
    prompts = ["The", "The Eiffel Tower is located in the city of", "Rome is"]
    opened = [
        [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        for prompt in prompts
    ]
    texts = generate(model, tokenizer, prompts, 12, seed=3)
    expected = [written_alone(model, tokenizer, *asked, 12, 3) for asked in zip(prompts, opened, strict=True)]
    assert texts == expected
