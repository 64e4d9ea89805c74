"""The loss of a fixed text against a loop over tokens, and facts that are known."""

import json
import math

import pytest
import torch
from model_zoo import small_model

from engram_kernels import EngramError
from engram_kernels.editing.held_out import text_loss, text_rows
from engram_kernels.evaluation import Question
from engram_kernels.evaluation.answers import greedy
from engram_kernels.evaluation.drift import Drift, drift_rows_of, read_known

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_loss_is_that_of_brute_force(tokenizer):
    model = small_model("llama", len(tokenizer), torch.float64)
    rows = text_rows(
        tokenizer, ["The tower is in Rome. " * 20, "short", "It is a museum in Paris. " * 20], 8, 24
    )
    assert len(rows) == 2 and all(len(row) == 24 for row in rows)
    found = []
    for row in rows:
        with torch.no_grad():
            logs = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
        found += [-logs[i, token].item() for i, token in enumerate(row[1:])]
    # The model's logits are fp64, and are rounded to fp32 once.
    assert text_loss(model, rows) == pytest.approx(sum(found) / len(found), rel=1e-6)


def test_the_rows_of_a_file(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("One two three four five six. " * 200, encoding="utf-8")
    rows = drift_rows_of(tokenizer, path, 3)
    assert len(rows) == 3 and len({tuple(row) for row in rows}) >= 1 and {len(row) for row in rows} == {128}
    path.write_text("too short", encoding="utf-8")
    with pytest.raises(EngramError, match="text: expected a text of at least 128 tokens, got none"):
        drift_rows_of(tokenizer, path, 3)


def test_known_facts_are_asked_again(tokenizer):
    model = small_model("llama", len(tokenizer))
    prompts = ["The tower is in", "Rome lies in"]
    right = [greedy(model, tokenizer, [prompt], 8)[0].text for prompt in prompts]
    known = [Question(prompt, text) for prompt, text in zip(prompts, right, strict=True) if text.strip()]
    assert known
    drift = Drift(model, tokenizer, facts=[*known, Question("The tower is in", "nowhere at all")])
    assert len(drift.known) == len(known) and drift.measure(model) == {"known_facts": 1.0}
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(-1)
    assert drift.measure(model)["known_facts"] < 1
    with pytest.raises(EngramError, match="known: expected facts that the model knows, got none among 1"):
        Drift(model, tokenizer, facts=[Question("Rome lies in", "nowhere at all")])


def test_perplexity_is_the_exponential(tokenizer):
    model = small_model("llama", len(tokenizer))
    found = Drift(model, tokenizer, [[1, 2, 3, 4]]).measure(model)
    assert found["perplexity"] == math.exp(found["text_loss"]) and found.keys() == {"text_loss", "perplexity"}
    assert repr(Drift(model, tokenizer, [[1, 2, 3, 4]])) == "Drift(4 tokens of text, 0 known facts)"


def test_facts_from_a_file(tmp_path):
    path = tmp_path / "known.json"
    path.write_text(json.dumps([{"prompt": "Rome is in", "attribute": "Italy"}, {"prompt": "x"}]))
    assert read_known(path, 1) == [Question("Rome is in", "Italy")]
    with pytest.raises(
        ValueError, match="expected some text under 'attribute' or 'answer' in row 1, got none"
    ):
        read_known(path)
