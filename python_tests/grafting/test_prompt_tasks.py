"""Classification by the next word, and how well it goes."""

import model_zoo
import pytest
import torch

from engram_kernels import EngramError
from engram_kernels.grafting import PromptTask, calibration_error, classification_score


def prompts(tokenizer):
    return PromptTask(tokenizer, "Text: {} It was", ["a", "b", "c"])


ROWS = [
    (0, "The Eiffel Tower"),
    (1, "Rome is"),
    (2, "A word may be cut into pieces, so it is longer"),
    (1, "x"),
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "granite"])
def test_prompt_logits_are_the_models(family):
    model, tokenizer = model_zoo.small_model(family), model_zoo.byte_level_tokenizer()
    task = prompts(tokenizer)
    (batch,) = task.batches(ROWS, 4)
    order = sorted(range(4), key=lambda i: len(task._encode(ROWS[i][1])))
    assert batch["labels"].tolist() == [ROWS[i][0] for i in order]
    with torch.no_grad():
        got = task.logits(model, batch)
        for row, i in zip(got, order, strict=True):
            ids = tokenizer(f"Text: {ROWS[i][1]} It was", return_tensors="pt").input_ids
            torch.testing.assert_close(row, model(ids).logits[0, -1, task.tokens], rtol=1e-4, atol=1e-4)
        loss = torch.nn.functional.cross_entropy(got, batch["labels"])
        torch.testing.assert_close(task.loss(model, batch), loss)


def test_batches_are_seeded_and_complete():
    task = prompts(model_zoo.byte_level_tokenizer())
    rows = [(i % 3, "word " * (i % 7)) for i in range(23)]
    labels = lambda batches: sorted(y for batch in batches for y in batch["labels"].tolist())  # noqa: E731
    one, same, other = (task.batches(rows, 4, seed=s) for s in (1, 1, 2))
    assert labels(one) == sorted(y for y, _ in rows) and len(one) == 6
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, same, strict=True))
    assert any(a["input_ids"].shape != b["input_ids"].shape for a, b in zip(one, other, strict=True))


def test_long_texts_keep_the_template():
    tokenizer = model_zoo.byte_level_tokenizer()
    task = PromptTask(tokenizer, "Text: {} It was", ["a", "b"], max_length=20)
    (batch,) = task.batches([(0, "many words " * 50)], 1)
    text = tokenizer.decode(batch["input_ids"][0])
    assert batch["input_ids"].shape[1] <= 20 and text.startswith("Text: many") and text.endswith(" It was")


def test_bad_tasks():
    tokenizer = model_zoo.byte_level_tokenizer()
    with pytest.raises(ValueError, match=r"template: expected one \{\}"):
        PromptTask(tokenizer, "no place", ["a", "b"])
    with pytest.raises(ValueError, match="words: expected words of one token, got 'zqxj'"):
        PromptTask(tokenizer, "{}", ["a", "zqxj"])
    with pytest.raises(ValueError, match="words: expected two or more different tokens"):
        PromptTask(tokenizer, "{}", ["a", "a"])
    with pytest.raises(ValueError, match="rows: expected labels from 0 to 2, got 3"):
        prompts(tokenizer).batches([(3, "x")], 1)


def test_classification_score():
    model = model_zoo.small_model()
    task = prompts(model_zoo.byte_level_tokenizer())
    result = classification_score(model, task.batches(ROWS, 3), task.logits)
    with torch.no_grad():
        parts = [(task.logits(model, batch), batch["labels"]) for batch in task.batches(ROWS, 1)]
    answers = [int(logits.argmax()) == int(label) for logits, label in parts]
    assert result.rows == 4 and result.accuracy == sum(answers) / 4
    assert result.loss == pytest.approx(
        sum(float(torch.nn.functional.cross_entropy(*part)) for part in parts) / 4, rel=1e-4
    )
    with pytest.raises(EngramError, match="batches: expected at least one, got none"):
        classification_score(model, [], task.logits)


def test_calibration_error():
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.45, 0.55]])
    labels = torch.tensor([0, 1, 1, 0])
    # Bins of width 0.1: two at 0.9 with half right, one at 0.7 right, one at 0.55 wrong.
    expected = (2 * abs(0.5 - 0.9) + abs(1 - 0.7) + abs(0 - 0.55)) / 4
    assert calibration_error(probabilities, labels, bins=10) == pytest.approx(expected, abs=1e-6)
    assert calibration_error(torch.eye(3), torch.arange(3)) == 0


def test_progress_and_what_is_shown():
    model, told = model_zoo.small_model(), []
    task = prompts(model_zoo.byte_level_tokenizer())
    classification_score(model, task.batches(ROWS, 3), task.logits, lambda *now: told.append(now))
    assert told == [("classify", 3, 4), ("classify", 4, 4)]
    assert repr(task) == "PromptTask('Text: {} It was', ['a', 'b', 'c'])"
