"""Caches of decoders that take and return them under either name."""

import types
import warnings

import pytest

pytest.importorskip("transformers")

import model_zoo
import torch
from torch import nn

from engram_kernels.errors import EngramError
from engram_kernels.hf.cache import (
    cache_inputs,
    empty_cache,
    filled_cache,
    inputs_after,
    keeps_the_whole_past,
    keys_and_values,
    output_cache,
    read_prefixes,
)
from engram_kernels.hf.tokens import pad_rows

IDS = torch.tensor([[5, 17, 200, 31, 8, 90, 41]])


class Named(nn.Module):
    """A decoder around another one, that knows its cache by one name only."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def run(self, cache, use_cache, inputs):
        given = cache_inputs(self.inner, cache) if use_cache else {"use_cache": False}
        output = self.inner(**inputs, **given)
        return output.logits, output_cache(output)


class Old(Named):
    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False
    ):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        logits, cache = self.run(past_key_values, use_cache, inputs)
        return types.SimpleNamespace(logits=logits, past_key_values=cache)


class New(Named):
    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=False):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        logits, cache = self.run(cache, use_cache, inputs)
        return types.SimpleNamespace(logits=logits, cache=cache)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def decoder(named=None, family="llama"):
    model = model_zoo.small_model(family).eval()
    return named(model) if named else model


named = pytest.mark.parametrize("named", [None, Old, New], ids=["transformers", "old", "new"])


@named
@torch.no_grad()
def test_one_token_a_step_reads_what_the_whole_text_does(named):
    model, cache, found = decoder(named), None, []
    for token in IDS.T:
        output = model(input_ids=token[None], **cache_inputs(model, cache))
        cache = output_cache(output)
        found.append(output.logits)
    assert cache.get_seq_length() == IDS.shape[1]
    torch.testing.assert_close(torch.cat(found, 1), model(input_ids=IDS, use_cache=False).logits)


@named
@torch.no_grad()
def test_an_output_without_a_cache_gives_none(named):
    assert output_cache(decoder(named)(input_ids=IDS, use_cache=False)) is None
    assert output_cache(types.SimpleNamespace(logits=None)) is None


@named
@torch.no_grad()
def test_texts_go_on_from_their_prefixes(named):
    """Rows of several lengths, the shared beginnings read once; one row has no prefix at all."""
    model = decoder(named)
    prefixes = [[5, 17, 200], [], [5, 17, 31, 8], []]
    rests = [[90, 41], [7, 9, 11], [3], [7, 2]]
    prefix = read_prefixes(model, prefixes, period=2)
    assert prefix.mask.sum(1).tolist() == [len(row) for row in prefixes]
    ids, mask = pad_rows(rests)
    logits = model(**inputs_after(model, prefix, ids, mask)).logits
    for row, (before, rest) in enumerate(zip(prefixes, rests, strict=True)):
        whole = model(input_ids=torch.tensor([before + rest]), use_cache=False).logits[0, len(before) :]
        torch.testing.assert_close(logits[row, : len(rest)], whole)
    few = torch.tensor([2, 0])
    again = model(**inputs_after(model, prefix.select(few), ids[few], mask[few])).logits
    torch.testing.assert_close(again, logits[few])
    assert read_prefixes(model, [[], []], period=1) is None


@torch.no_grad()
def test_prefixes_are_read_without_the_head(monkeypatch):
    model = decoder()
    monkeypatch.setattr(model.lm_head, "forward", None)
    assert read_prefixes(model, [[5, 17]], period=1).mask.tolist() == [[1, 1]]


@torch.no_grad()
def test_a_filled_cache_leaves_its_tensors_alone():
    model = decoder()
    pairs = [tuple(torch.randn(2, 2, 3, 8) for _ in "kv") for _ in range(4)]
    copies = [tuple(tensor.clone() for tensor in pair) for pair in pairs]
    cache = filled_cache(pairs)
    assert cache.get_seq_length() == 3
    model(input_ids=IDS.expand(2, -1), **cache_inputs(model, cache))
    assert cache.get_seq_length() == 10
    torch.testing.assert_close(pairs, copies, rtol=0, atol=0)
    assert keys_and_values(cache, 4, 2, 10) is not None
    for other in ((3, 2, 10), (4, 1, 10), (4, 2, 3)):
        assert keys_and_values(cache, *other) is None


@torch.no_grad()
def test_windows_are_told_from_the_whole_past():
    for family, whole in (("llama", True), ("gemma3", False)):
        model = decoder(family=family)
        cache = empty_cache(model.config)
        model(input_ids=IDS, **cache_inputs(model, cache))
        assert cache.get_seq_length() == 7
        assert keeps_the_whole_past(cache) is whole


def test_a_model_that_keeps_nothing_is_refused(monkeypatch):
    model = decoder()
    plain = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, **_: plain(input_ids, use_cache=False))
    with pytest.raises(EngramError, match="model: expected one that keeps keys and values of every token"):
        read_prefixes(model, [[5, 17]], period=1)
