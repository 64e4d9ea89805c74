"""Values that are token embeddings: the memory's algebra on them, and back to words."""

import pytest
import torch
from larimar_helpers import LATENT, sentence_encoder
from memory_helpers import apart, latents
from model_zoo import byte_level_tokenizer, small_model

from engram_kernels.larimar import ReadAloud, TokenValues, row_weights
from engram_kernels.larimar.token_values import _cut
from engram_kernels.memory import EpisodicMemory

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["The Louvre lies in", "The tower is in the city of", "The mother tongue of Anna is"]
OBJECTS = ["Paris", "Rome", "Japan and Brazil"]


def reader(**options):
    encoder = sentence_encoder()
    memory = EpisodicMemory(LATENT, LATENT, ridge=1e-3)
    memory.write(encoder.encode(OBJECTS), encoder.encode(PROMPTS), PROMPTS, OBJECTS)
    return ReadAloud(memory, encoder, small_model("llama"), byte_level_tokenizer(), **options)


@pytest.mark.parametrize("ridge", [1e-3, 0.5, "loo"])
@pytest.mark.parametrize("slots", [16, 40])
def test_weights_of_rows_make_up_the_readout(slots, ridge):
    memory = EpisodicMemory(slots, 32, ridge=ridge)
    values, keys, queries = latents(3, 9, 32)
    memory.write(values, keys, ids=list("abcdefg"), parts=[1, 1, 1, 3, 1, 1, 1])
    weights = row_weights(memory, queries)
    assert weights.shape == (9, 9)
    assert apart(weights @ values, memory.read(queries, addressing="key")) < 1e-9
    memory.forget(ids=["d"])
    left = torch.cat([values[:3], values[6:]])
    assert apart(row_weights(memory, queries) @ left, memory.read(queries, addressing="key")) < 1e-9


def test_weights_ask_for_a_single_memory_with_ids():
    with pytest.raises(ValueError, match="memory: expected a single one, got 2"):
        row_weights(EpisodicMemory(4, 4, batch=2), latents(1, 4))
    memory = EpisodicMemory(4, 4)
    assert row_weights(memory, latents(2, 4)).shape == (2, 0)
    memory.write(latents(2, 4))
    with pytest.raises(ValueError, match="memory: expected one all of whose rows have ids, got 2 without"):
        row_weights(memory, latents(1, 4))


def test_texts_come_back_from_mixtures():
    values = TokenValues(small_model("llama"), byte_level_tokenizer(), slots=20)
    encoded = values.encode(OBJECTS)
    assert encoded.shape == (3, values.size) and values.decode(encoded) == OBJECTS
    # The heaviest of a mixture, at whatever length; nothing from nothing; what is too long loses its end.
    mixed = torch.tensor([[0.6, 0.1, -0.1], [0.1, 0.2, 0.05], [0.0, 0.0, 0.0]]) @ encoded
    assert values.decode(mixed) == ["Paris", "Rome", ""]
    short = TokenValues(small_model("llama"), byte_level_tokenizer(), slots=2)
    (cut,) = short.decode(short.encode(["Japan and Brazil"]))
    assert "Japan and Brazil".startswith(cut) and cut
    with pytest.raises(ValueError, match="readouts: expected shape"):
        values.decode(torch.zeros(1, 3))


def test_a_memory_is_read_in_words_and_forgets_them():
    aloud = reader(slots=20)
    assert aloud.read(PROMPTS) == OBJECTS and aloud.read([]) == []
    aloud.memory.forget(ids=[PROMPTS[1]])
    assert aloud.read([PROMPTS[0], PROMPTS[2]]) == [OBJECTS[0], OBJECTS[2]]
    assert OBJECTS[1] not in aloud.read(PROMPTS)
    aloud.memory.reset()
    assert aloud.read(PROMPTS) == [""] * 3


def test_the_decoder_hears_the_words_before_the_prompt():
    aloud, heard = reader(slots=20), []
    aloud.written = lambda rows, _: heard.extend(map(aloud.tokenizer.decode, rows)) or ["x"] * len(rows)
    assert aloud.answer(PROMPTS[:1]) == ["x"]
    assert heard == [f"Repeat: {PROMPTS[0]} Paris.\n\n{PROMPTS[0]}"]
    heard.clear()
    aloud.say(PROMPTS[:1], [""])
    assert heard == PROMPTS[:1]


@torch.no_grad()
def test_an_answer_is_what_the_decoder_writes_up_to_a_stop():
    aloud = reader()
    ids = torch.tensor([aloud.tokenizer(PROMPTS[0])["input_ids"]])
    written = aloud.decoder.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[
        0, ids.shape[1] :
    ]
    text = aloud.tokenizer.decode(written, skip_special_tokens=True)
    (answer,) = aloud.say(PROMPTS[:1], [""], max_new_tokens=5)
    assert answer == (text.strip() if _cut(text) is None else _cut(text))
    assert _cut(" Paris, the city.") == "Paris" and _cut(" Paris\nRome") == "Paris" and _cut(" Paris") is None
