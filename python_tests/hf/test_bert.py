"""BERT in torch's own layers gives the latents that it gives in transformers."""

import json

import pytest
import torch
from model_zoo import TEXTS, small_encoder, word_piece_tokenizer
from safetensors.torch import load_file, save_file

import engram_kernels as ek
from engram_kernels.hf.bert import read_bert
from engram_kernels.memory import load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path):
    small_encoder().save_pretrained(tmp_path)
    word_piece_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_latents_are_those_of_transformers(folder, monkeypatch):
    whole, texts = load_encoder(folder), [*TEXTS[:4], "Rome", "Paris is the capital. " * 30, "ünknown 日本"]

    def refused():
        raise AssertionError("transformers was asked for")

    monkeypatch.setattr("engram_kernels.hf.loading.import_transformers", refused)
    light = load_encoder(folder, light=True)
    assert (light.latent, light.max_length, light.name) == (whole.latent, whole.max_length, whole.name)
    torch.testing.assert_close(light.encode(texts), whole.encode(texts), rtol=0, atol=2e-6)
    alone = torch.cat([light.encode([text]) for text in texts])
    torch.testing.assert_close(light.encode(texts), alone, rtol=0, atol=2e-6)
    assert light._count(texts) == whole._count(texts)
    with pytest.raises(ek.EngramError, match=r"^device: expected one that PyTorch can use here, got 'tpu'"):
        load_encoder(folder, device="tpu", light=True)


def test_weights_may_be_half_and_named_as_part_of_a_model(folder):
    expected = load_encoder(folder).encode(TEXTS[:2])
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {f"bert.{name}": tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    torch.testing.assert_close(
        load_encoder(folder, light=True).encode(TEXTS[:2]), expected, rtol=0, atol=0.01
    )


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "roberta"},
        {"hidden_act": "relu"},
        {"position_embedding_type": "relative_key"},
        {"quantization_config": {}},
    ],
)
def test_other_encoders_are_left_to_transformers(folder, change):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert read_bert(folder) is None


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_so_are_folders_that_lack_something(folder, name):
    (folder / name).unlink()
    assert read_bert(folder) is None
    small_encoder().save_pretrained(folder)
    word_piece_tokenizer().save_pretrained(folder)
    (folder / name).write_bytes(b"{}")
    assert read_bert(folder) is None
