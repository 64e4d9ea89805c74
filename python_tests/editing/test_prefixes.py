"""Texts that are sampled: what is drawn is what whole passes and torch.multinomial draw."""

import pytest

pytest.importorskip("transformers")

import model_zoo
import torch

from engram_kernels.editing.search import prefixes
from engram_kernels.editing.statistics import corpus
from engram_kernels.hf.hooks import capture
from engram_kernels.hf.tokens import open_ids


@pytest.fixture(scope="module")
def tokenizer():
    return model_zoo.byte_level_tokenizer()


@torch.no_grad()
def whole_passes(model, rows, wanted, generator):
    """Every growing row read whole, one draw from each one's five likeliest tokens a step."""
    rows = [list(row) for row in rows]
    while growing := [i for i, row in enumerate(rows) if len(row) < wanted[i]]:
        logits = torch.stack([model(torch.tensor([rows[i]])).logits[0, -1] for i in growing])
        top = logits.topk(5)
        choice = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
        for i, token in zip(growing, top.indices.gather(-1, choice).flatten().tolist(), strict=True):
            rows[i].append(token)
    return rows


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prefixes_are_drawn_as_by_whole_passes(family, tokenizer):
    """The first words have two to ten tokens here, and the texts end at different steps."""
    model = model_zoo.small_model(family).eval()
    lengths = ((5, 3), (12, 4), (1, 1))
    wanted = [5] * 3 + [12] * 4 + [1]
    first = [open_ids(tokenizer, prefixes.FIRST_WORDS[i % 5]) for i in range(8)]
    assert len(set(map(len, first))) > 1
    generator = torch.Generator().manual_seed(3)
    expected = [
        " ".join(tokenizer.decode(row, skip_special_tokens=True).split())
        for row in whole_passes(model, first, wanted, generator)
    ]
    assert prefixes.sample_prefixes(model, tokenizer, lengths, seed=3) == expected


def test_sampled_corpora_are_drawn_as_by_whole_passes(tokenizer, monkeypatch):
    monkeypatch.setattr(corpus, "SAMPLED_ROWS", 3)
    monkeypatch.setattr(corpus, "SAMPLED_LENGTH", 6)
    model = model_zoo.small_model().eval()
    shapes = []
    with capture(
        before={model: lambda _module, _arguments, given: shapes.append(given["input_ids"].shape[1])}
    ):
        found = corpus.sample_ids(model, tokenizer, 25, seed=4)
    assert shapes == [1] * 12
    generator = torch.Generator().manual_seed(4)
    expected = []
    for _ in range(2):
        block = torch.full((3, 1), tokenizer.eos_token_id)
        for _ in range(6):
            with torch.no_grad():
                chances = model(block, use_cache=False).logits[:, -1].softmax(-1)
            block = torch.cat([block, torch.multinomial(chances, 1, generator=generator)], 1)
        expected.append(block[:, 1:].flatten())
    assert torch.equal(found, torch.cat(expected)[:25])
