"""Fine-tuned weights from adapters, checkpoints of other layouts and other dtypes; and that some changed."""

import copy
import json

import model_zoo
import pytest
import torch
from editing_helpers import changed, weights
from gguf_files import write_gguf
from grafting_helpers import language_batches, tuned

import engram_kernels as ek
from engram_kernels import EngramError
from engram_kernels.grafting import DeltaReader, DeltaWriter, Graft, graftable_parameters, localize
from engram_kernels.grafting.tuned import tuned_tensors


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def named(model):
    return {name: weight.detach() for name, weight in model.named_parameters()}


def read(source, model):
    return tuned_tensors(source, model, list(named(model)), "tuned")


# -- adapters ------------------------------------------------------------------------------------------------


def adapted(model, **options):
    """The model with a LoRA in it, its parameters after merging, by PEFT itself."""
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**{**settings, **options}))
    if "modules_to_save" in options:
        with torch.no_grad():
            wrapped.base_model.model.lm_head.modules_to_save.default.weight.add_(1)
    return wrapped, named(copy.deepcopy(wrapped).merge_and_unload())


OPTIONS = {
    "plain": {},
    "half precision": {},
    "rank-stabilised": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "dora": {"use_dora": True},
    "a module trained whole": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_adapters_are_merged(tmp_path, case):
    dtype = torch.bfloat16 if case == "half precision" else torch.float32
    model = model_zoo.small_model(dtype=dtype)
    before = weights(model)
    wrapped, expected = adapted(model, **OPTIONS[case])
    wrapped.save_pretrained(tmp_path / "adapter")
    assert equal(read(wrapped, model), expected)
    assert equal(read(tmp_path / "adapter", model), expected)
    assert not changed(before, model) and all(weight.requires_grad for weight in model.parameters())
    if case not in (
        "half precision",
        "dora",
        "a module trained whole",
    ):  # PEFT's undo of a merge is not exact
        wrapped.merge_adapter()
        assert equal(read(wrapped, model), expected)


def test_a_conv1d_is_merged_as_it_lies(tmp_path):
    model = model_zoo.small_model("gpt2")
    wrapped, expected = adapted(model, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    wrapped.save_pretrained(tmp_path / "adapter")
    assert equal(read(wrapped, model), expected) and equal(read(tmp_path / "adapter", model), expected)


def test_a_graft_of_an_adapter_is_one_of_its_values():
    model = model_zoo.small_model()
    wrapped, expected = adapted(model)
    graft = localize(model, wrapped, language_batches(), sparsity=1e-3, steps=5)
    pre = named(model)
    moved = 0
    for name, at in graft.indices.items():
        assert torch.equal(graft.values[name], expected[name].flatten()[at.long()])
        moved += int((graft.values[name] != pre[name].flatten()[at.long()]).sum())
    assert moved > 0.9 * graft.size


def test_an_adapter_of_another_model_is_refused(tmp_path):
    wrapped, _ = adapted(model_zoo.small_model())
    wrapped.save_pretrained(tmp_path / "adapter")
    message = r"^tuned: expected weights at '.*adapter', got an adapter that does not fit the model"
    with pytest.raises(EngramError, match=message):
        read(tmp_path / "adapter", model_zoo.small_model("gpt2"))
    with pytest.raises(EngramError, match=message):
        read(tmp_path / "adapter", model_zoo.small_model("qwen3"))


# -- checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2_moe", "qwen3_moe", "gpt2", "phi3"])
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_saved_models_are_read_under_the_models_names(tmp_path, family, shards):
    """Mixtures of experts are saved expert by expert."""
    model = model_zoo.small_model(family)
    other = tuned(model)
    other.save_pretrained(tmp_path / "tuned", max_shard_size=shards)
    assert (len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1) == (shards == "20KB")
    assert equal(read(tmp_path / "tuned", model), named(other))


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_models_saved_without_their_prefix(tmp_path, family):
    """As the model without its head is saved: `h.0…` for `transformer.h.0…`."""
    model = model_zoo.small_model(family)
    other = tuned(model)
    other.base_model.save_pretrained(tmp_path / "tuned")
    names = list(graftable_parameters(model))
    found = tuned_tensors(tmp_path / "tuned", model, names, "tuned")
    assert equal(found, {name: named(other)[name] for name in names})


def test_of_a_folders_files_those_are_read_that_transformers_loads(tmp_path):
    from safetensors.torch import load_file, save_file

    model = model_zoo.small_model()
    folder, other = tmp_path / "tuned", tuned(model)
    other.save_pretrained(folder)
    # An average kept beside it, and an index that is left of an earlier save.
    average = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(average, folder / "model_ema.safetensors")
    assert equal(read(folder, model), named(other))
    index = {"weight_map": dict.fromkeys(average, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert equal(read(folder, model), named(other))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert equal(read(folder, model), named(other))
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(
        EngramError, match=r"^tuned: expected safetensors .*in several files, one of them model_ema"
    ):
        read(folder, model)


@pytest.mark.parametrize("wrap", [lambda x: torch.compile(x, backend="eager"), torch.nn.DataParallel])
def test_wrappers_are_looked_through(tmp_path, wrap):
    """Also in a state dict that was taken with one around, and in the file that it was saved to."""
    from safetensors.torch import save_file

    model = model_zoo.small_model()
    other = tuned(model)
    state = wrap(other).state_dict()
    assert not state.keys() & named(other).keys()
    save_file({name: weight.clone() for name, weight in state.items()}, tmp_path / "tuned.safetensors")
    for source in (
        wrap(other),
        state,
        tmp_path / "tuned.safetensors",
        torch.nn.DataParallel(wrap(other)).state_dict(),
    ):
        assert equal(read(source, model), named(other))
    graft = Graft.from_difference(wrap(model).state_dict(), state)
    with graft.apply(model):
        assert equal(named(model), named(other))
    writer = DeltaWriter(tmp_path / "deltas", wrap(model))
    writer.write(state)
    writer.write(wrap(other))
    DeltaReader(tmp_path / "deltas", model).pull()
    assert equal(named(model), named(other))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_models_of_an_older_format_are_read(tmp_path, family):
    model = model_zoo.small_model(family)
    other = tuned(model)
    other.config.save_pretrained(tmp_path)
    torch.save(other.state_dict(), tmp_path / "pytorch_model.bin")
    assert equal(read(tmp_path, model), named(other))
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(EngramError, match=r"^tuned: expected weights at .*, got .*pytorch_model\.bin"):
        read(tmp_path, model)


def test_what_a_checkpoint_lacks_is_not_made_up(tmp_path):
    model = model_zoo.small_model("gpt2")
    tuned(model).base_model.save_pretrained(tmp_path / "tuned")
    (path,) = (tmp_path / "tuned").glob("*.safetensors")
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors["h.2.mlp.c_fc.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        EngramError, match=r"expected a tensor 'transformer\.h\.2\.mlp.c_fc.weight', got none"
    ):
        tuned_tensors(tmp_path / "tuned", model, list(graftable_parameters(model)), "tuned")


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_of_other_dtypes_come_in_the_models(tmp_path, saved, dtype):
    from safetensors.torch import save_file

    model = model_zoo.small_model(dtype=dtype)
    tensors = {name: weight.clone().to(saved) for name, weight in named(tuned(model)).items()}
    save_file(tensors, tmp_path / "tuned.safetensors")
    found = read(tmp_path / "tuned.safetensors", model)
    assert equal(found, {name: tensor.to(dtype) for name, tensor in tensors.items()})


def test_quantised_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    model = model_zoo.small_model()
    tensors = {name: weight.clone().to(torch.float8_e4m3fn) for name, weight in named(model).items()}
    save_file(tensors, tmp_path / "tuned.safetensors")
    with pytest.raises(EngramError, match=r"^tuned: expected plain weights, got torch\.float8_e4m3fn in "):
        read(tmp_path / "tuned.safetensors", model)


def test_weights_of_a_quantising_class_are_refused():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = model_zoo.small_model()
    graft, quantised = (
        Graft.from_difference(model.state_dict(), tuned(model).state_dict()),
        copy.deepcopy(model),
    )
    quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
    message = r": expected plain weights, got Int8Tensor.* in 'model\.layers\.0\.self_attn\.q_proj\.weight'$"
    for whose, act in (
        ("model", lambda: graft.apply(quantised)),
        ("model", lambda: graft.apply(quantised, force=True)),
        ("model", lambda: localize(quantised, model, recipe="largest")),
        ("ft_model", lambda: localize(model, quantised, recipe="largest")),
    ):
        with pytest.raises(EngramError, match=f"^{whose}{message}"):
            act()


# -- something must have changed -----------------------------------------------------------------------------


def find(model, other, **options):
    return localize(model, other, language_batches(), sparsity=1e-3, steps=5, **options)


def test_nothing_changed_is_said_so():
    model = model_zoo.small_model()
    message = r"ft_model: expected weights that differ from the base's, got the same in all \d+ graftable"
    wrapped, _ = adapted(model, init_lora_weights=True)
    for same in (model, copy.deepcopy(model), wrapped):
        with pytest.raises(EngramError, match=f"^{message}.*a training that changed nothing"):
            find(model, same)
    wrapped, _ = adapted(model)
    with wrapped.disable_adapter(), pytest.raises(EngramError, match="an adapter that is switched off"):
        find(model, wrapped)


def test_changes_outside_the_graftable_weights_are_named():
    model = model_zoo.small_model()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.add_(1)
        other.model.norm.weight.add_(1)
    with pytest.raises(
        EngramError, match=r"outside of them: 'model\.norm\.weight', 'lm_head\.weight' \(incl"
    ):
        find(model, other)
    graft = find(model, tuned(model))
    assert graft.metrics["changed_outside"] == [
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
    ]  # fmt: skip
    whole = find(model, tuned(model), include=["*"])
    assert "changed_outside" not in whole.metrics


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(bad):
    model = model_zoo.small_model()
    name = "model.layers.2.mlp.up_proj.weight"
    for whose, spoilt in (("ft_model", tuned(model)), ("pre_model", model)):
        with torch.no_grad():
            spoilt.get_parameter(name).view(-1)[7] = bad
        other = spoilt if whose == "ft_model" else tuned(model_zoo.small_model())
        with pytest.raises(
            EngramError, match=rf"^{whose}: expected finite weights, got {bad} in '{name}' at 7"
        ):
            find(model, other)


def test_masks_that_choose_nothing_new_make_no_graft():
    pre = {"layers.0.w": torch.arange(10.0)}
    ft = {"layers.0.w": torch.where(torch.arange(10) == 3, 9.5, torch.arange(10.0))}
    masks = [ek.pack_mask(torch.arange(10) == i) for i in (3, 4)]
    assert Graft.from_masks(pre, ft, {"layers.0.w": masks[0]}).size == 1
    with pytest.raises(
        EngramError, match=r"^ft: expected values that differ from pre's, got the same at all 1"
    ):
        Graft.from_masks(pre, ft, {"layers.0.w": masks[1]})


@pytest.mark.parametrize("which", ["file", "folder"])
def test_a_gguf_file_is_read(tmp_path, which):
    """By transformers' own reader, which needs the gguf package."""
    model = model_zoo.small_model()
    other = tuned(model)
    write_gguf(tmp_path / "model-f32.gguf", other)
    path = tmp_path if which == "folder" else tmp_path / "model-f32.gguf"
    assert equal(read(path, model), named(other))
    expected, found = find(model, other), find(model, path)
    assert equal(found.indices, expected.indices) and equal(found.values, expected.values)


def test_a_graft_gives_its_masks_back():
    model = model_zoo.small_model()
    graft = find(model, tuned(model))
    pre, ft = named(model), named(tuned(model))
    shapes = {name: pre[name] for name in graft.shapes}
    again = Graft.from_masks(shapes, ft, graft.masks())
    assert equal(again.indices, graft.indices) and equal(again.values, graft.values)
    assert json.dumps(graft.metrics)
