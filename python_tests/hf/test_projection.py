"""The MLP's output projection is found by structure; what cannot be edited soundly is refused.

Also in a model that wears a LoRA, and in one that is quantised.
"""

import pytest

pytest.importorskip("transformers")

import copy
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import model_zoo
import torch
from editing_helpers import changed, small_editor, weights
from torch import nn
from torch.nn.utils import prune

from engram_kernels.editing import Edit, dequantize_layer
from engram_kernels.editing.search.values import ValueOptions
from engram_kernels.errors import EngramError
from engram_kernels.hf.layers import decoder_layers
from engram_kernels.hf.projection import default_layer, output_projection

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


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_routed_experts_are_refused(family):
    refuse(model_zoo.small_model(family), "one MLP .* got routed experts alone")


def test_of_a_mixture_the_shared_expert_is_written():
    projection = output_projection(model_zoo.small_model("qwen2_moe"), 1)
    assert projection.name == "model.layers.1.mlp.shared_expert.down_proj"


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"^model: expected a Hugging Face model, got NoneType$"):
        output_projection(None, 0)


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


# -- adapters ------------------------------------------------------------------------------------------------

EDIT = Edit("The Eiffel Tower", "{}", "Rome")
IDS = torch.tensor([[5, 17, 200, 31, 8, 90, 41, 3]])
TARGETS = {
    "llama": ["down_proj", "gate_proj", "q_proj", "embed_tokens"],
    "gpt2": ["mlp.c_proj", "c_fc"],
    "opt": ["fc1", "fc2"],
}


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.fixture
def make(cache, one_thread):
    value = ValueOptions(steps=8, weight_decay=0.0, kl_weight=0.0, clamp=1e6)
    return partial(small_editor, cache_dir=cache, contexts=((4, 2),), value=value)


def with_lora(family="llama", **options):
    """A small model, and a copy of it that wears a random LoRA."""
    peft = pytest.importorskip("peft")
    base = model_zoo.small_model(family)
    settings = {"r": 4, "target_modules": TARGETS[family], "fan_in_fan_out": family == "gpt2", **options}
    config = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    return base, peft.get_peft_model(copy.deepcopy(base), config).eval()


@pytest.mark.parametrize("family", TARGETS)
def test_edit_under_a_lora_is_that_of_the_merged_model(make, family, recwarn):
    """The LoRA is part of what the model sees and answers; the base's own weight is written."""
    base, model = with_lora(family)
    merged = copy.deepcopy(model).merge_and_unload()
    before, plain = weights(model), logits(model)
    result = make(model=model).edit(EDIT, layers=1)
    (module,) = result.modules
    assert module == output_projection(base, 1).name
    assert changed(before, model) == [f"base_model.model.{module}.base_layer.weight"]
    assert not [warning for warning in recwarn if "recorded states" in str(warning.message)]
    expected = make(model=merged).edit(EDIT, layers=1)
    assert result.records[0].probability_after > 2 * result.records[0].probability_before
    for mine, theirs in zip(result.factors(module), expected.factors(module), strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()
    torch.testing.assert_close(logits(model), logits(merged), rtol=1e-4, atol=1e-4)
    result.revert()
    assert not changed(before, model) and torch.equal(logits(model), plain)


def test_edit_under_a_lora_is_saved_for_the_base(make, tmp_path):
    peft = pytest.importorskip("peft")
    base, model = with_lora()
    result = make(model=model).edit(EDIT, layers=1)
    result.save_pretrained(tmp_path / "edit")
    with model.disable_adapter():
        expected = logits(model)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "edit")
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)
    result.revert()
    result.apply(base)
    assert torch.equal(logits(base), expected)
    result.revert()
    result.apply(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_edit_with_the_lora_off_is_that_of_the_base(make):
    base, model = with_lora()
    expected = make(model=base).edit(EDIT, layers=1)
    with model.disable_adapter():
        result = make(model=model).edit(EDIT, layers=1)
    for mine, theirs in zip(
        result.factors(result.modules[0]), expected.factors(expected.modules[0]), strict=True
    ):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


def test_statistics_know_whether_a_lora_is_on(make):
    _, model = with_lora()
    editor = make(model=model)
    on = editor.covariance(1).inverse()
    with model.disable_adapter():
        off = editor.covariance(1).inverse()
    assert not torch.allclose(on, off, rtol=1e-2)
    assert torch.equal(editor.covariance(1).inverse(), on)


def test_injected_lora(make):
    peft = pytest.importorskip("peft")
    model = model_zoo.small_model()
    config = peft.LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, model).eval()
    before = weights(model)
    with make(model=model).edit(EDIT, layers=1) as result:
        assert result.modules == ["model.layers.1.mlp.down_proj"]
        assert changed(before, model) == ["model.layers.1.mlp.down_proj.base_layer.weight"]
    assert not changed(before, model)


def test_adapters_that_do_not_add_are_refused():
    peft = pytest.importorskip("peft")
    refuse(with_lora(use_dora=True)[1], "adds to the output .* such as DoRA: merge it first")
    scaled = peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    refuse(peft.get_peft_model(model_zoo.small_model(), scaled), "no adapter but LoRA")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    refuse(peft.get_peft_model(model_zoo.small_model(), prompt), "a learnt prompt")


def test_merged_lora_is_refused_until_it_is_taken_out():
    _, model = with_lora()
    model.merge_adapter()
    refuse(model, "merged into it: unmerge")
    model.unmerge_adapter()
    assert output_projection(model, 1).matrix.shape == (32, 64)


# -- quantised layers ----------------------------------------------------------------------------------------


class Packed(nn.Module):
    """A linear map that keeps bytes and scales, as quantised layers do that are no `nn.Linear`.

    It takes keys of the type that it was made for, and no other.
    """

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        packed = (linear.weight.detach() / scales).round().to(torch.int8)
        self.qweight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, keys):
        return nn.functional.linear(keys, self.qweight * self.scales, self.bias)


def packed_model(family="llama", dtype=torch.float32):
    model = model_zoo.small_model(family, dtype=dtype)
    for name, module in list(decoder_layers(model)[1].named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(decoder_layers(model)[1].get_submodule(parent), child, Packed(module))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_quantised_layer_is_made_plain_and_edited(make, family, dtype):
    model = packed_model(family, dtype)
    packed, plain = decoder_layers(model)[1][1], logits(model)
    packed = packed.fc2 if family == "opt" else packed.mlp.down_proj
    refuse(model, r"got Packed; where it is quantised, editing.dequantize_layer\(model, 1\)")
    linear = dequantize_layer(model, 1)
    assert output_projection(model, 1).module is linear and not linear.training
    assert torch.equal(linear.weight, packed.qweight * packed.scales)
    assert linear.bias is None if packed.bias is None else torch.equal(linear.bias, packed.bias)
    torch.testing.assert_close(logits(model), plain)
    before = weights(model)
    with make(model=model).edit(EDIT, layers=1) as result:
        assert result.records[0].probability_after > 2 * result.records[0].probability_before
        assert changed(before, model) == [f"{result.modules[0]}.weight"]
    assert not changed(before, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
)
def test_torchao_weights_are_seen_and_made_plain(make, kind, dtype):
    """They say that they are of a floating-point type."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = model_zoo.small_model(dtype=dtype)
    torchao.quantize_(model.model.layers, getattr(torchao, kind)())
    weight = model.model.layers[1].mlp.down_proj.weight
    assert weight.dtype == dtype
    refuse(model, f"got {type(weight).__name__} of {dtype}; where it is quantised")
    linear = dequantize_layer(model, 1)
    assert torch.equal(linear.weight, weight.dequantize())
    with make(model=model).edit(EDIT, layers=1) as result:
        assert result.records[0].probability_after > 2 * result.records[0].probability_before
    assert torch.equal(linear.weight, weight.dequantize())


def matrices(names):
    """Without the scales of four bits, which the library rounds in a forward pass on some CPUs."""
    return [name for name in names if name.endswith(".weight")]


@pytest.mark.parametrize("ran", [False, True], ids=["loaded", "after a forward pass"])
@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_bitsandbytes_weights_are_made_plain(make, kind, ran):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = model_zoo.small_model()
    for layer in model.model.layers:
        # The other two are too narrow for a block of four bits on a CPU with AVX512-BF16.
        linear = layer.mlp.down_proj
        packed = getattr(bnb.nn, kind)(linear.in_features, linear.out_features, bias=False)
        packed.load_state_dict(linear.state_dict())
        if kind == "Linear8bitLt":
            packed.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False)
        layer.mlp.down_proj = packed.to("cpu").eval()
    packed = model.model.layers[1].mlp.down_proj
    refuse(model, f"got {type(packed.weight).__name__} of torch.u?int8; where it is quantised")
    if kind == "Linear4bit":
        expected = bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
    else:
        expected = packed.weight.data * packed.weight.SCB[:, None] / 127
    if ran:
        logits(model)
    # Eight-bit layers answer in float16. Some CPUs' four-bit ones round their scales and answers to bfloat16.
    near = torch.finfo(torch.float16).eps if kind == "Linear8bitLt" else 0
    if getattr(getattr(packed.weight, "quant_state", None), "packing_format_for_cpu", False):
        near = torch.finfo(torch.bfloat16).eps
    linear = dequantize_layer(model, 1)
    torch.testing.assert_close(linear.weight.detach(), expected, rtol=near, atol=0)
    before = weights(model)
    with make(model=model).edit(EDIT, layers=1) as result:
        assert result.records[0].probability_after > 2 * result.records[0].probability_before
        assert matrices(changed(before, model)) == ["model.layers.1.mlp.down_proj.weight"]
    assert not matrices(changed(before, model))


class FourBits(torch.Tensor):
    """A weight of a library that computes in bfloat16, but can say what it stands for."""

    __module__ = "four_bits.nn.modules"


class FourBitLinear(nn.Linear):
    def __init__(self, linear, packed):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.register_buffer("exact", linear.weight.detach().clone())
        packing = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8).as_subclass(FourBits)
        packing.quant_state = SimpleNamespace(layer=self, packing_format_for_cpu=packed)
        del self.weight
        self.weight = packing

    def forward(self, states):
        return (states.bfloat16() @ self.exact.bfloat16().T).to(states.dtype)


@pytest.mark.parametrize("packed", [False, True])
def test_what_a_library_says_goes_before_what_its_layer_answers(monkeypatch, packed):
    """bitsandbytes' layers answer in bfloat16 on some CPUs; once packed for that, nothing else is left."""

    def dequantize_4bit(data, state):
        assert type(data) is FourBits and not state.packing_format_for_cpu
        return state.layer.exact

    monkeypatch.setitem(sys.modules, "four_bits", ModuleType("four_bits"))
    functional = ModuleType("four_bits.functional")
    functional.dequantize_4bit = dequantize_4bit
    monkeypatch.setitem(sys.modules, "four_bits.functional", functional)
    model = model_zoo.small_model()
    exact = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    model.model.layers[1].mlp.down_proj = FourBitLinear(model.model.layers[1].mlp.down_proj, packed)
    found = dequantize_layer(model, 1).weight
    assert torch.equal(found, exact.bfloat16().float() if packed else exact)


def test_model_that_stops_gradients_is_refused(make):
    """As one whose activations are quantised; its edits would change nothing."""
    model = model_zoo.small_model()
    before = weights(model)
    hook = model.model.layers[3].register_forward_hook(lambda _module, _inputs, output: output.detach())
    with pytest.raises(EngramError, match=r"^model: expected one that gradients pass through, got"):
        make(model=model).edit(EDIT, layers=1)
    hook.remove()
    assert not changed(before, model)


def test_layers_that_cannot_be_made_plain():
    model = packed_model()
    for layer, error in ((4, ValueError), ("1", TypeError)):
        with pytest.raises(error, match=r"^layer: expected .*, got "):
            dequantize_layer(model, layer)
    with pytest.raises(ValueError, match=r"^dtype: expected torch.float32.*got torch.int8"):
        dequantize_layer(model, 1, torch.int8)
    with pytest.raises(EngramError, match=r"^layer: expected a quantised one, got 1, whose .* is plain"):
        dequantize_layer(model_zoo.small_model(), 1)
    packed = model.model.layers[1].mlp.down_proj
    packed.scales[0] = torch.nan
    with pytest.raises(EngramError, match="got NaN or infinity"):
        dequantize_layer(model, 1)
    for forward in (lambda keys: keys[:, :32] + 1, lambda keys: keys[:, :32].relu()):
        packed.forward = forward
        with pytest.raises(EngramError, match=r"^model: expected linear maps, got a Packed that is not one"):
            dequantize_layer(model, 1)
    assert model.model.layers[1].mlp.down_proj is packed
    _, wrapped = with_lora()
    with pytest.raises(
        EngramError, match=r"^model: expected no adapter on .*got Linear: dequantise the base"
    ):
        dequantize_layer(wrapped, 1)
