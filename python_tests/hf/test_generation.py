"""The sampler: rows of several lengths in step, one token a row and step."""

import pytest

pytest.importorskip("transformers")

import model_zoo
import torch

from engram_kernels.hf.cache import read_prefixes
from engram_kernels.hf.generation import sample, write_on
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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_rows_are_written_on_together_as_alone(family):
    model = model_zoo.small_model(family).eval()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 400, (size,), generator=generator).tolist() for size in (3, 9, 5)]
    prefixes = [torch.randint(1, 400, (size,), generator=generator).tolist() for size in (4, 2, 7)]
    expected = []
    for prefix, row in zip(prefixes, rows, strict=True):
        ids = prefix + row
        for _ in range(6):
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        expected.append(ids[len(prefix + row) :])
    # The second row is done when its third token is there.
    expected[1] = expected[1][:3]
    prefix = read_prefixes(model, prefixes, len(prefixes))
    assert write_on(model, rows, 6, lambda written: written == expected[1], prefix) == expected
    whole = [prefix + row for prefix, row in zip(prefixes, rows, strict=True)]
    assert write_on(model, whole, 6, lambda written: written == expected[1]) == expected
    # What all rows begin with is read once, but for their last tokens.
    alike = [prefixes[0] + row for row in (prefixes[0], [7], [])]
    alone = [write_on(model, [row], 4, lambda _: False)[0] for row in alike]
    sizes = []
    with capture(
        before={model: lambda _module, _given, named: sizes.append(tuple(named["input_ids"].shape))}
    ):
        assert write_on(model, alike, 4, lambda _: False) == alone
    assert sizes[:2] == [(1, 3), (3, 5)]
