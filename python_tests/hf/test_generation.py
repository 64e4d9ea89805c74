"""The sampler: rows of several lengths in step, one token a row and step."""

import pytest

pytest.importorskip("transformers")

import model_zoo
import torch

from engram_kernels.hf.generation import greedy, sample
from engram_kernels.hf.hooks import capture

ROWS = [[5, 17, 200], [31], [8, 90, 41, 3, 7], [12, 60]]
COUNTS = [4, 2, 3, 0]


def likeliest(_numbers, logits):
    return logits.argmax(-1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom"])
def test_rows_are_written_on_as_each_alone_with_whole_passes(family):
    model = model_zoo.small_model(family).eval()
    expected = []
    with torch.no_grad():
        for row, count in zip(ROWS, COUNTS, strict=True):
            row = list(row)
            for _ in range(count):
                row.append(model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax().item())
            expected.append(row)
    given = [list(row) for row in ROWS]
    assert sample(model, given, COUNTS, likeliest) == expected
    assert given == ROWS


def test_one_token_a_step():
    """The rows' common length at once; then one token until the last row has ended, and none beyond."""
    model = model_zoo.small_model().eval()
    shapes, asked = [], []

    def see(_module, _arguments, keywords):
        shapes.append(tuple(keywords["input_ids"].shape))

    def choose(numbers, logits):
        assert logits.shape == (len(numbers), 400) and logits.dtype == torch.float32
        asked.append(list(numbers))
        return likeliest(numbers, logits)

    with capture(before={model: see}):
        sample(model, [row[:] for row in ROWS[:1] + ROWS[2:3]], [2, 1], choose)
        sample(model, ROWS, [0] * 4, choose)
    assert shapes == [(2, 3), (2, 1), (2, 1)]
    assert asked == [[0], [0], [1]]


def test_no_gradients_and_half_precision():
    model = model_zoo.small_model(dtype=torch.bfloat16).eval()

    def choose(_numbers, logits):
        assert logits.dtype == torch.float32 and not logits.requires_grad
        return [3] * len(logits)

    assert sample(model, [[5]], [3], choose) == [[5, 3, 3, 3]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom"])
@torch.no_grad()
def test_rows_are_written_on_together_as_alone(family):
    model = model_zoo.small_model(family).eval()
    # What a model's settings ask for besides plays no part.
    model.generation_config.update(do_sample=True, temperature=2.0, repetition_penalty=3.0)
    generator = torch.Generator().manual_seed(0)
    draw = lambda size: torch.randint(1, 400, (size,), generator=generator).tolist()  # noqa: E731
    shared, rests = draw(11), [draw(size) for size in (3, 9, 5)]
    for rows in (rests, [shared + rest for rest in (*rests, rests[0][:1], rests[0])], [shared]):
        expected = []
        for row in rows:
            ids = list(row)
            for _ in range(6):
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
            expected.append(ids[len(row) :])
        assert greedy(model, rows, 6) == expected
        # The last row is done when its third token is there, as is one that begins alike; and another where
        # the model closes.
        wanted = [row[:3] if row[:3] == expected[-1][:3] else row for row in expected]
        assert greedy(model, rows, 6, wanted[-1].__eq__) == wanted
        model.generation_config.eos_token_id = [399, expected[0][1]]
        first = [next((i for i, token in enumerate(row) if token == expected[0][1]), 5) for row in expected]
        assert greedy(model, rows, 6) == [row[: i + 1] for row, i in zip(expected, first, strict=True)]
        model.generation_config.eos_token_id = 0
    assert greedy(model, [], 6) == []


def test_what_rows_begin_with_is_read_once():
    """But for a token of each row, whose prediction is wanted."""
    model, shared, sizes = model_zoo.small_model().eval(), list(range(5, 12)), []
    see = lambda _module, _given, named: sizes.append(tuple(named["input_ids"].shape))  # noqa: E731
    with capture(before={model: see}):
        greedy(model, [shared, [*shared, 9], [*shared, 3, 4]], 2)
    assert sizes == [(1, 6), (3, 3), (3, 1)]
