"""Models in wrappers, compiled ones, and ones whose weights accelerate keeps elsewhere."""

import pytest

pytest.importorskip("transformers")

import model_zoo
import torch
from editing_helpers import changed, small_editor, weights
from torch import nn

from engram_kernels._hashing import tensor_checksum
from engram_kernels.editing import Edit, EditResult
from engram_kernels.editing.search.values import ValueOptions
from engram_kernels.errors import EngramError
from engram_kernels.hf import fingerprints
from engram_kernels.hf.fingerprints import states_fingerprint, weights_checksums
from engram_kernels.hf.loading import load_model
from engram_kernels.hf.projection import output_projection

pytestmark = pytest.mark.usefixtures("one_thread")

EDIT = Edit("The Eiffel Tower", "{} is located in the city of", "Rome")


def compiled(way):
    """A model that was compiled in one of the three ways, and that model itself."""
    model = model_zoo.small_model("llama")
    if way == "wrapped":
        return torch.compile(model, backend="eager"), model
    if way == "in place":
        model.compile(backend="eager")
    else:
        for number, layer in enumerate(model.model.layers):
            model.model.layers[number] = torch.compile(layer, backend="eager")
    model(input_ids=torch.tensor([[1, 2, 3]]))
    return model, model


def checksums(tensors):
    return {name: tensor_checksum(tensor) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def plain(cache):
    """An edit of the model by itself, and its weights with it."""
    editor = small_editor(cache_dir=cache)
    result = editor.edit(EDIT, layers=1)
    return result, weights(editor.model)


@pytest.mark.parametrize("way", ["wrapped", "in place", "layer by layer"])
def test_compiled_model_is_edited_like_itself(plain, tmp_path, way):
    given, own = compiled(way)
    result = small_editor(model=given, cache_dir=tmp_path).edit(EDIT, layers=1)
    assert result.modules == plain[0].modules
    assert weights_checksums(own) == checksums(plain[1])
    assert result.records[0].losses == plain[0].records[0].losses
    result.save_pretrained(tmp_path / "edit")
    fresh = model_zoo.small_model("llama")
    EditResult.from_pretrained(tmp_path / "edit").apply(fresh)
    assert changed(plain[1], fresh) == []


def test_compiled_model_says_what_was_written(plain, tmp_path):
    given, _ = compiled("wrapped")
    ids = torch.tensor([[1, 2, 3]])
    given(input_ids=ids)
    plain[0].save_pretrained(tmp_path / "edit")
    with EditResult.from_pretrained(tmp_path / "edit").apply(given):
        expected = model_zoo.small_model("llama")
        expected.load_state_dict(plain[1])
        torch.testing.assert_close(given(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_wrappers_have_the_fingerprint_of_their_model():
    model = model_zoo.small_model("llama")
    expected = states_fingerprint(model, output_projection(model, 2))
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        assert states_fingerprint(wrapped, output_projection(wrapped, 2)) == expected
        assert weights_checksums(wrapped) == weights_checksums(model)


@pytest.mark.parametrize(
    ("part", "sees"),
    [
        ("model.embed_tokens", True),
        ("model.layers.1.mlp.down_proj", True),
        ("model.layers.2.mlp.up_proj", True),
        ("model.layers.2.mlp.down_proj", False),
        ("model.layers.3.mlp.up_proj", False),
        ("lm_head", False),
    ],
)
def test_fingerprint_sees_what_the_states_depend_on(part, sees):
    model = model_zoo.small_model("llama")
    projection = output_projection(model, 2)
    before = states_fingerprint(model, projection)
    with torch.no_grad():
        model.get_submodule(part).weight.add_(1)
    assert (states_fingerprint(model, projection) != before) == sees


def test_fingerprint_leaves_out_settings_of_the_output():
    model = model_zoo.small_model("llama")
    projection = output_projection(model, 2)
    before = states_fingerprint(model, projection)
    model.config.use_cache, model.config.architectures = not model.config.use_cache, ["Other"]
    assert states_fingerprint(model, projection) == before
    model.config.rms_norm_eps *= 2
    assert states_fingerprint(model, projection) != before


def test_each_tensor_is_read_once_for_all_layers(monkeypatch):
    model = model_zoo.small_model("llama")
    read, checksum = [], fingerprints.tensor_checksum
    monkeypatch.setattr(fingerprints, "tensor_checksum", lambda tensor: read.append(1) or checksum(tensor))
    for layer in (3, 2, 1):
        states_fingerprint(model, output_projection(model, layer))
    tensors = sum(name != "lm_head.weight" for name in model.state_dict())
    # The projection of the deepest layer is below none.
    assert len(read) == tensors - 1


def offloaded(tmp_path, *layers):
    """The small model from a folder, with some layers on a disk, as accelerate places them."""
    pytest.importorskip("accelerate")
    import transformers

    model = model_zoo.small_model("llama")
    if not (tmp_path / "model").exists():
        model.save_pretrained(tmp_path / "model")
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys(names, "cpu") | {
        f"model.layers.{layer}": "disk" if layer in layers else "cpu" for layer in range(4)
    }
    if "embeddings" in layers:
        places["model.embed_tokens"] = "disk"
    return transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, device_map=places, offload_folder=tmp_path / "offloaded"
    ).eval()


def test_layers_elsewhere_are_read_for_fingerprints(tmp_path):
    model, whole = offloaded(tmp_path, 0, 3), model_zoo.small_model("llama")
    assert model.model.layers[0].mlp.down_proj.weight.is_meta
    assert weights_checksums(model) == weights_checksums(whole)
    expected = states_fingerprint(whole, output_projection(whole, 2))
    assert states_fingerprint(model, output_projection(model, 2)) == expected


@pytest.mark.parametrize("layers", [(0, 3), (2, 3)])
def test_edit_of_a_layer_in_memory_among_others_elsewhere(plain, tmp_path, layers):
    model = offloaded(tmp_path, *layers)
    result = small_editor(model=model, cache_dir=tmp_path).edit(EDIT, layers=1)
    assert result.records[0].losses == plain[0].records[0].losses
    assert result.records[0].change_norm == plain[0].records[0].change_norm
    module = "model.layers.1.mlp.down_proj.weight"
    # What is read from a file is aligned otherwise, on which the last bit of a product depends.
    own, expected = model.state_dict()[module], plain[1][module]
    torch.testing.assert_close(own, expected, rtol=0, atol=2 * 2**-23 * expected.abs().max().item())


@pytest.fixture
def live(monkeypatch):
    """How many bytes of the weights that accelerate brought were there at once, at most."""
    from accelerate import utils
    from torch.multiprocessing.reductions import StorageWeakRef

    read, brought, peak = utils.OffloadedWeightsLoader.__getitem__, [], [0]

    def spy(self, name):
        weight = read(self, name)
        brought.append((StorageWeakRef(weight.untyped_storage()), weight.nbytes))
        brought[:] = [(storage, size) for storage, size in brought if not storage.expired()]
        peak[0] = max(peak[0], sum(size for _, size in brought))
        return weight

    monkeypatch.setattr(utils.OffloadedWeightsLoader, "__getitem__", spy)
    return peak


@pytest.mark.parametrize("incremental", [True, False])
def test_one_layer_of_those_elsewhere_is_live_at_a_time(tmp_path, live, incremental):
    model = offloaded(tmp_path, 1, 2, 3)
    options = ValueOptions(steps=3, learning_rate=0.02, weight_decay=0.0, incremental=incremental)
    result = small_editor(model=model, cache_dir=tmp_path, value=options).edit(EDIT, layers=0)
    layer = sum(parameter.nbytes for parameter in model_zoo.small_model("llama").model.layers[1].parameters())
    assert 0 < live[0] <= 1.3 * layer
    expected = small_editor(cache_dir=tmp_path, value=options).edit(EDIT, layers=0)
    assert result.records[0].losses == expected.records[0].losses
    # The value itself, to the bit; and there is one.
    assert torch.equal(result.writes[0].residuals, expected.writes[0].residuals)
    assert result.writes[0].residuals.any()
    for module in model.modules():
        assert not {"pre_forward", "post_forward"} & vars(getattr(module, "_hf_hook", nn.Module())).keys()


def test_tokens_go_where_embeddings_are_brought_to(tmp_path):
    model = offloaded(tmp_path, "embeddings")
    assert model.model.embed_tokens.weight.is_meta
    found = small_editor(model=model, cache_dir=tmp_path).edit(EDIT, layers=1).records[0]
    expected = small_editor(cache_dir=tmp_path).edit(EDIT, layers=1).records[0]
    assert (found.losses, found.change_norm) == (expected.losses, expected.change_norm)


def test_load_model_places_layers(tmp_path):
    offloaded(tmp_path)
    model_zoo.byte_level_tokenizer().save_pretrained(tmp_path / "model")
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys([*names, *(f"model.layers.{layer}" for layer in range(3))], "cpu")
    places["model.layers.3"] = "disk"
    loaded, _ = load_model(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded")
    assert loaded.model.layers[3].mlp.down_proj.weight.is_meta
    assert weights_checksums(loaded) == weights_checksums(model_zoo.small_model("llama"))


def test_load_model_takes_one_placement(tmp_path):
    with pytest.raises(ValueError, match=r"^device_map: expected None beside \['device'\], got both$"):
        load_model(tmp_path, device="cpu", device_map="auto")
    with pytest.raises(ValueError, match=r"^tp_plan: expected None beside \['device_map'\], got both$"):
        load_model(tmp_path, device_map="auto", tp_plan="auto")


def test_edited_layer_elsewhere_is_refused(tmp_path):
    words = r"^model: expected its weights in memory, .*accelerate.* device_map .* layer 1 .*engram apply$"
    with pytest.raises(EngramError, match=words):
        output_projection(offloaded(tmp_path, 1), 1)
