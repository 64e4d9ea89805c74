"""What is written, against a loop over tokens, and what counts as the answer."""

import pytest
import torch
from model_zoo import small_model, word_piece_tokenizer

from engram_kernels import EngramError
from engram_kernels.evaluation.answers import Success, greedy, success

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["The", "The Eiffel Tower is located in the city of ", "Rome is", "Therefore I think that you"]


def written_alone(model, tokenizer, prompt, count):
    """The likeliest tokens without batch, padding or cache."""
    ids = list(tokenizer(prompt)["input_ids"])
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids[start:]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "bloom", "gemma2"])
def test_written_texts_are_those_of_brute_force(tokenizer, family):
    model = small_model(family, len(tokenizer))
    # What a model's settings ask for besides plays no part.
    model.generation_config.update(do_sample=True, temperature=2.0, repetition_penalty=3.0)
    counts = [6, 3, 1, 5]
    found = greedy(model, tokenizer, PROMPTS, counts, batch_size=3)
    special = set(tokenizer.all_special_ids)
    for prompt, count, got in zip(PROMPTS, counts, found, strict=True):
        ids = written_alone(model, tokenizer, prompt.rstrip(" "), count)
        end = next((i for i, token in enumerate(ids) if token in special), len(ids))
        assert got.first == ids[0] and got.text == tokenizer.decode(ids[:end])
    assert greedy(model, tokenizer, PROMPTS, 4, batch_size=1) == greedy(model, tokenizer, PROMPTS, 4)
    assert greedy(model, tokenizer, [], 4) == []


def test_a_text_ends_at_a_special_token():
    tokenizer = word_piece_tokenizer()
    model = small_model("llama", len(tokenizer))
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
        model.get_output_embeddings().weight[tokenizer.eos_token_id] = 1.0
        model.model.norm.weight.fill_(1.0)
    (found,) = greedy(model, tokenizer, ["Rome is"], 5)
    assert found.text == "" or found.first != tokenizer.eos_token_id


def test_texts_that_are_too_long(tokenizer):
    model = small_model("llama", len(tokenizer))
    with pytest.raises(
        EngramError, match=r"prompt: expected at most 128 tokens with the 127 to write, .* got"
    ):
        greedy(model, tokenizer, PROMPTS, 127)


@pytest.mark.parametrize(
    ("text", "answer", "marks"),
    [
        (" Rome", "Rome", "exact begins contains"),
        (" Rome. It is old.", "Rome", "exact begins contains"),
        ("\nRome\nParis", "Rome", "exact begins contains"),
        ("**Rome**, of course", "Rome", "begins contains"),
        (" rome and Paris", "Rome", "begins contains"),
        ("The answer is Rome.", "Rome", "contains"),
        ("Romea", "Rome", ""),
        ("Jerome", "Rome", ""),
        ("", "Rome", ""),
        ("纽约市", "纽约", "begins contains"),
        ("在纽约。", "纽约", "contains"),
        ("U.S. Army", "U.S.", "begins contains"),
        ("C++", "C++", "exact begins contains"),
        ("$5 each", "$5", "begins contains"),
        ("12", "1", ""),
        ("Praha", "Prague", ""),
    ],
)
def test_what_counts_as_the_answer(text, answer, marks):
    found = success(text, answer)
    assert {name for name in ("exact", "begins", "contains") if getattr(found, name)} == set(marks.split())


def test_an_alias_is_as_good():
    assert success(" Praha", "Prague", ("Praha", "Prag")) == Success(True, True, True, 1.0)


def test_the_overlap_of_long_answers():
    answer = "She wrote the first program for a machine"
    assert success("She wrote the first program for a machine", answer).overlap == 1
    # "She wrote a … program": four of its eight words in their order.
    assert success("She wrote, long ago, a short program", answer).overlap == 3 / 8
    assert success("machine a for program first the wrote She", answer).overlap == 1 / 8
    assert success("天下归仁", "天下归仁焉").overlap == 4 / 5
