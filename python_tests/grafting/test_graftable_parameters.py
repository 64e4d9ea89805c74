"""Which parameters a graft may change."""

import model_zoo
import pytest
import torch

from engram_kernels import EngramError
from engram_kernels.grafting import graftable_parameters


@pytest.mark.parametrize("family", model_zoo.FAMILIES)
def test_graftable_are_the_layers_and_nothing_else(family):
    model = model_zoo.small_model(family)
    names = list(graftable_parameters(model))
    assert names and len({name.split(".")[-3] for name in names}) > 1
    outside = [name for name, _ in model.named_parameters() if name not in names]
    assert any("emb" in name or "wte" in name or "embed" in name for name in outside)
    assert not any("lm_head" in name or "wte" in name or "embed_tokens" in name for name in names)


def test_patterns_choose():
    model = model_zoo.small_model()
    mlp = graftable_parameters(model, include=["*.mlp.*"])
    assert mlp and all(".mlp." in name for name in mlp)
    fewer = graftable_parameters(model, exclude=["*norm*"])
    assert not any("norm" in name for name in fewer)
    with pytest.raises(ValueError, match=r"include: expected a pattern that matches a parameter, got 'x\*'"):
        graftable_parameters(model, include=["x*"])
    with pytest.raises(TypeError, match=r"exclude: expected a list of patterns, got the string '\*norm\*'"):
        graftable_parameters(model, exclude="*norm*")
    with pytest.raises(ValueError, match="include: expected at least one pattern, got none"):
        graftable_parameters(model, include=[])
    with pytest.raises(ValueError, match="none left"):
        graftable_parameters(model, exclude=["*"])


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="model: expected a module, got str"):
        graftable_parameters("gpt2")


def test_weights_that_cannot_be_grafted_are_refused():
    model = model_zoo.small_model()
    model.lm_head.weight = torch.nn.Parameter(model.model.layers[0].self_attn.q_proj.weight.data[:, :16])
    with pytest.raises(EngramError, match=r"model: expected a weight of its own in .*, got that of"):
        graftable_parameters(model)
    with torch.inference_mode():
        made = model_zoo.small_model()
    with pytest.raises(EngramError, match="model: expected weights made outside inference mode"):
        graftable_parameters(made)
    with pytest.raises(
        EngramError, match=r"model: expected float32, bfloat16 or float16, got torch\.float64"
    ):
        graftable_parameters(model_zoo.small_model().double())
    with pytest.raises(EngramError, match="meta device"):
        graftable_parameters(model_zoo.small_model().to("meta"))


def test_a_weight_within_another_ones_memory_is_refused():
    """Between the two in memory lies a third that ends before the second begins."""
    model = model_zoo.small_model()
    memory = torch.zeros(100)
    for name, start, size in (("long", 0, 100), ("short", 10, 10)):
        model.register_parameter(name, torch.nn.Parameter(memory[start : start + size]))
    norm = model.model.layers[0].input_layernorm
    norm.weight = torch.nn.Parameter(memory[40:72])
    with pytest.raises(
        EngramError, match=r"own in 'model\.layers\.0\.input_layernorm.*', got that of 'long'"
    ):
        graftable_parameters(model)
