"""The MLP's output projection is found by structure; what cannot be edited soundly is refused."""

import pytest

pytest.importorskip("transformers")

import model_zoo
import torch
from torch import nn
from torch.nn.utils import prune

from engram_kernels.editing.structure import default_layer, output_projection
from engram_kernels.errors import EngramError
from engram_kernels.models.layers import decoder_layers

NAMES = {
    "llama": "model.layers.2.mlp.down_proj",
    "qwen3": "model.layers.2.mlp.down_proj",
    "phi3": "model.layers.2.mlp.down_proj",
    "gpt2": "transformer.h.2.mlp.c_proj",
    "gpt_neox": "gpt_neox.layers.2.mlp.dense_4h_to_h",
    "opt": "model.decoder.layers.2.fc2",
}


@pytest.mark.parametrize("family", model_zoo.FAMILIES)
def test_projection_of_every_family(family):
    model = model_zoo.small_model(family)
    projection = output_projection(model, 2)
    assert projection.name == NAMES[family]
    assert model.get_submodule(projection.name) is projection.module
    assert projection.matrix.shape == (32, 64)
    keys = torch.randn(3, 64)
    bias = projection.module.bias
    expected = keys @ projection.matrix.T + (0 if bias is None else bias)
    torch.testing.assert_close(projection.module(keys), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_matrix_is_a_view(family):
    model = model_zoo.small_model(family)
    projection = output_projection(model, 0)
    projection.matrix[1, 2] = 7.0
    stored = projection.module.weight
    assert (stored[2, 1] if family == "gpt2" else stored[1, 2]) == 7.0


def test_default_layer_is_by_depth():
    model = model_zoo.small_model("llama")
    assert default_layer(model) == 1
    assert len(decoder_layers(model)[1]) == 4


@pytest.mark.parametrize(
    "layer, error", [(4, ValueError), (-1, ValueError), ("2", TypeError), (True, TypeError), (1.0, TypeError)]
)
def test_unknown_layer(layer, error):
    with pytest.raises(error, match=r"^layer: expected .*, got "):
        output_projection(model_zoo.small_model("llama"), layer)


def refuse(model, words):
    with pytest.raises(EngramError, match=f"^model: expected .*{words}"):
        output_projection(model, 1)


def test_mixture_of_experts_is_refused():
    refuse(model_zoo.small_model("mixtral"), "one MLP")


def test_model_without_layers_is_refused():
    refuse(nn.Linear(2, 2), "decoder layers")


def test_quantised_weight_is_refused():
    model = model_zoo.small_model("llama")
    projection = model.model.layers[1].mlp.down_proj
    projection.weight = nn.Parameter(projection.weight.detach().to(torch.int8), requires_grad=False)
    refuse(model, "quantised")


def test_float8_weight_is_refused():
    model = model_zoo.small_model("llama")
    projection = model.model.layers[1].mlp.down_proj
    projection.weight = nn.Parameter(projection.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    refuse(model, "quantised")


def test_adapter_is_refused():
    model = model_zoo.small_model("llama")
    mlp = model.model.layers[1].mlp
    wrapper = nn.Module()
    wrapper.base_layer = mlp.down_proj
    mlp.down_proj = wrapper
    refuse(model, "adapter")


def test_shared_weight_is_refused():
    model = model_zoo.small_model("llama")
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[2].mlp.down_proj.weight
    refuse(model, "shared")


def test_offloaded_weight_is_refused():
    model = model_zoo.small_model("llama")
    model.model.layers[1].mlp.down_proj.to("meta")
    refuse(model, "memory")


def test_wide_dtype_is_refused():
    refuse(model_zoo.small_model("llama").double(), "float64")


def test_weight_of_shared_memory_is_refused():
    model = model_zoo.small_model("llama")
    shared = model.model.layers[2].mlp.down_proj.weight.detach()
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(shared)
    refuse(model, "shared with 'model.layers.2.mlp.down_proj.weight'")


@pytest.mark.parametrize("kind", ["weight_norm", "prune"])
def test_computed_weight_is_refused(kind):
    model = model_zoo.small_model("llama")
    projection = model.model.layers[1].mlp.down_proj
    if kind == "prune":
        prune.random_unstructured(projection, "weight", 0.5)
    else:
        nn.utils.parametrizations.weight_norm(projection)
    refuse(model, "a plain weight")


def test_inference_weight_is_refused():
    with torch.inference_mode():
        model = model_zoo.small_model("llama")
    refuse(model, "outside inference mode")
