"""Folders of a `LarimarModel` and of a `ScopedModel`."""

import json
import shutil

import model_zoo
import pytest
import torch
from larimar_helpers import FACTS, LATENT, padded_batch, scoped_model, small_larimar

import engram_kernels as ek
import engram_kernels.larimar.scoped_model as scoped_module
from engram_kernels.larimar import LarimarModel, ScopeDetector, ScopedModel
from engram_kernels.memory import SentenceEncoder


def test_save_and_load_whole(tmp_path):
    model = small_larimar("gpt2", addressing="content", ridge=0.5)
    model.write(torch.randint(1, 300, (2, 5)), ids=["a", "b"])
    model.save_pretrained(tmp_path)
    again = LarimarModel.from_pretrained(tmp_path)
    ids, mask, readout = padded_batch()
    run = {"input_ids": ids, "attention_mask": mask, "readout": readout}
    assert torch.equal(again(**run).logits, model(**run).logits)
    assert again.memory.ids == ["a", "b"] and again.config.addressing == "content"
    query = torch.randint(1, 300, (2, 5))
    assert torch.equal(again.read(query), model.read(query))
    model.forget(["a", "b"])
    model.save_pretrained(tmp_path)  # into the same folder: the memory's is gone
    assert len(LarimarModel.from_pretrained(tmp_path).memory) == 0


@pytest.mark.parametrize("written", [False, True])
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, written):
    model = small_larimar()
    if written:
        model.write(torch.randint(1, 300, (2, 5)), ids=["a", "b"])
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "notes.txt").write_text("mine")
    with pytest.raises(ek.EngramError, match=r"^directory: expected a new or empty one, got .*memory'$"):
        model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["memory", "notes.txt"]


def test_weights_may_be_read_by_all_and_options_are_not_swallowed(tmp_path):
    model = small_larimar()
    with pytest.raises(TypeError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "model", push_to_hub=True)
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_save_and_load_by_name(tmp_path, monkeypatch):
    from engram_kernels.larimar import model as larimar

    tokenizer = model_zoo.word_piece_tokenizer()
    encoder = SentenceEncoder(model_zoo.small_encoder(LATENT), tokenizer)
    monkeypatch.setattr(larimar, "load_encoder", lambda name: encoder)
    monkeypatch.setattr(larimar, "load_model", lambda name: (model_zoo.small_model(), None))
    ids, _, readout = padded_batch()
    for options, parts in (({}, {"conditioning"}), ({"train_decoder": True}, {"conditioning", "decoder"})):
        model = LarimarModel.from_bases("an-encoder", "a-decoder", slots=8, hidden=8, **options).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        folder = tmp_path / str(len(parts))
        model.save_pretrained(folder)
        from safetensors.torch import load_file

        assert {name.split(".")[0] for name in load_file(folder / "model.safetensors")} == parts
        again = LarimarModel.from_pretrained(folder)
        assert torch.equal(
            again(input_ids=ids, readout=readout).logits, model(input_ids=ids, readout=readout).logits
        )
        assert again.config.encoder_name == "an-encoder" and again.config.decoder_name == "a-decoder"


def test_damaged_folders_are_refused(tmp_path):
    model = small_larimar()
    (tmp_path / "file").write_text("")
    with pytest.raises(ek.EngramError, match="save_directory: expected a directory that can be written"):
        model.save_pretrained(tmp_path / "file" / "folder")
    model.save_pretrained(tmp_path)
    with pytest.raises(ek.EngramError, match="name_or_directory: expected a folder or a repository"):
        LarimarModel.from_pretrained(tmp_path / "none")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden": 17}))
    with pytest.raises(ek.EngramError, match="expected the weights of its configuration"):
        LarimarModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ek.EngramError, match="expected a model of type 'larimar', got 'llama'"):
        LarimarModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        ek.EngramError, match=r"^name_or_directory: expected a model that save_pretrained wrote"
    ):
        LarimarModel.from_pretrained(tmp_path)


def test_scoped_model_is_saved(tmp_path, monkeypatch):
    scoped = scoped_model()
    for names in ((None, None), ("an-encoder", None), (None, "a-decoder")):
        scoped.model.config.encoder_name, scoped.model.config.decoder_name = names
        scoped.save_pretrained(tmp_path / f"{names}")
        with pytest.raises(ek.EngramError, match=r"^name_or_directory: expected bases with names"):
            ScopedModel.from_pretrained(tmp_path / f"{names}")
    scoped.model.config.encoder_name, scoped.model.config.decoder_name = "an-encoder", "a-decoder"
    scoped.write([FACTS[0].prompt], ["Rome"])
    scoped.save_pretrained(tmp_path / "named")
    monkeypatch.setattr(scoped_module, "load_encoder", lambda name: scoped.encoder)
    monkeypatch.setattr(scoped_module, "load_model", lambda name: (scoped.model.decoder, scoped.tokenizer))
    again = ScopedModel.from_pretrained(tmp_path / "named")
    prompts = [fact.prompt for fact in FACTS]
    assert again.detector.threshold == scoped.detector.threshold
    assert again.answer(prompts) == scoped.answer(prompts)
    (tmp_path / "named" / "scope.json").write_text("{}")
    with pytest.raises(ek.EngramError, match=r"^name_or_directory: expected what save_pretrained wrote"):
        ScopedModel.from_pretrained(tmp_path / "named")


@pytest.fixture
def named(monkeypatch):
    """A scoped model whose bases are loaded by name, with a fact."""
    scoped = scoped_model()
    scoped.model.config.encoder_name, scoped.model.config.decoder_name = "an-encoder", "a-decoder"
    scoped.write([FACTS[0].prompt], ["Rome"])
    monkeypatch.setattr(scoped_module, "load_encoder", lambda name: scoped.encoder)
    monkeypatch.setattr(scoped_module, "load_model", lambda name: (scoped.model.decoder, scoped.tokenizer))
    return scoped


def test_a_scoped_model_is_replaced_by_who_knows_what_is_there(named, tmp_path):
    named.save_pretrained(tmp_path / "model")
    with pytest.raises(ek.EngramError, match=r"^directory: expected a new or empty one"):
        named.save_pretrained(tmp_path / "model")
    other = ScopedModel.from_pretrained(tmp_path / "model")
    other.write([FACTS[1].prompt], ["Paris"])
    other.detector = ScopeDetector(0.25)
    other.save_pretrained(tmp_path / "model", replace=True)
    again = ScopedModel.from_pretrained(tmp_path / "model")
    assert again.detector.threshold == 0.25 and len(again.model.memory) == 2
    named.write([FACTS[2].prompt], ["Italy"])
    with pytest.raises(ek.EngramError, match=r"^directory: expected what this memory read or wrote there"):
        named.save_pretrained(tmp_path / "model", replace=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ek.EngramError, match=r"^directory: expected a new or empty one"):
        named.save_pretrained(tmp_path / "other", replace=True)


def test_models_travel_over_the_hub(named, tmp_path, monkeypatch):
    import huggingface_hub

    class Api:
        def __init__(self, **_options):
            pass

        def create_repo(self, repo_id, **_options):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, **_options):
            shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: tmp_path / name)
    named.push_to_hub("someone/scoped")
    again = ScopedModel.from_pretrained("someone/scoped")
    prompts = [fact.prompt for fact in FACTS]
    assert again.answer(prompts) == named.answer(prompts)
    named.model.push_to_hub("someone/model")
    bases = {"encoder": named.model.encoder, "decoder": named.model.decoder}
    model = LarimarModel.from_pretrained("someone/model", **bases)
    assert model.memory.ids == [prompts[0]]


def test_what_is_printed_is_short(named):
    assert str(named.model).count("\n") <= 4 and "LlamaForCausalLM" in str(named.model)
    assert str(named).count("\n") <= 6 and "ScopeDetector(0.9999)" in str(named)
    assert str(named.encoder).count("\n") == 0 and "BertModel" in str(named.encoder)
