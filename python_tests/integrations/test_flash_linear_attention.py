"""The ridge memory under the interface of flash-linear-attention's layers, with and without that library."""

import sys
from types import ModuleType

import pytest
import torch
from accuracy import error

import engram_kernels as ek
from engram_kernels.errors import EngramError


class Cache:
    """As the library's: what a layer updates by name, it gets back by its index."""

    def __init__(self):
        self.states = []

    def __len__(self):
        return len(self.states)

    def __getitem__(self, index):
        return self.states[index]

    def update(self, layer_idx, offset, **state):
        self.states[layer_idx:] = [state]


@pytest.fixture
def layer(monkeypatch):
    layers = ModuleType("fla.layers")
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.layers", layers)
    found = ek.integrations.register_with_fla()
    assert layers.RidgeMemory is found
    return lambda **options: found(hidden_size=12, num_heads=2, head_dim=5, layer_idx=0, **options).double()


@pytest.mark.parametrize("rule", ["ridge", "delta"])
@pytest.mark.parametrize("use_short_conv", [True, False])
def test_tokens_from_the_cache(layer, rule, use_short_conv):
    module, cache = layer(rule=rule, use_short_conv=use_short_conv), Cache()
    x = torch.randn(2, 9, 12).double()
    whole, attentions, nothing = module(x)
    assert attentions is None and nothing is None
    parts = [module(part, past_key_values=cache, use_cache=True)[0] for part in x.split([5, 1, 3], 1)]
    assert error(torch.cat(parts, 1), whole) < 1e-10


def test_padding_is_not_seen(layer):
    module, x = layer(), torch.randn(2, 9, 12).double()
    mask = torch.ones(2, 9)
    mask[0, :4] = mask[1, 7:] = 0
    out, _, _ = module(x, attention_mask=mask)
    assert error(out[:1, 4:], module(x[:1, 4:])[0]) < 1e-10
    assert error(out[1:, :7], module(x[1:, :7])[0]) < 1e-10
    assert not out[mask == 0].any()
    with pytest.raises(ValueError, match="past_key_values: expected None where tokens are padded"):
        module(x, attention_mask=mask, past_key_values=Cache())


def test_a_missing_library_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.delitem(sys.modules, "fla.layers", raising=False)
    with pytest.raises(EngramError, match="flash-linear-attention cannot be imported"):
        ek.integrations.register_with_fla()
