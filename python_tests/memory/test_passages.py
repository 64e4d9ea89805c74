"""Long texts are cut into passages that overlap, and nothing of them is lost."""

import model_zoo
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_kernels.memory import SentenceEncoder
from engram_kernels.memory.passages import passages

pytestmark = pytest.mark.usefixtures("one_thread")


def words(texts):
    return [len(text.split()) for text in texts]


def characters(texts):
    return [len(text.strip()) for text in texts]


def test_passages_are_whole_sentences_that_overlap():
    text = 'One two. Three four five! "Six?" Seven eight.\nNine ten eleven twelve thirteen fourteen fifteen.'
    assert passages(text, words, 100, 3) == [text]
    assert passages(text, words, 6, 3) == [
        'One two. Three four five! "Six?"',
        '"Six?" Seven eight.',
        "Nine ten eleven twelve thirteen fourteen",
        "fifteen.",
    ]
    assert passages(text, words, 6, 0)[:2] == ['One two. Three four five! "Six?"', "Seven eight."]


def test_scripts_without_blanks_are_cut_too():
    text = "天地玄黄。宇宙洪荒。" + "日" * 95
    found = passages(text, characters, 50, 0)
    assert "".join(found) == text and all(len(passage) <= 50 for passage in found) and len(found) == 3


def test_sentences_end_as_their_script_ends_them():
    assert passages("यह पुल है। वह नदी है। वह घर है।", words, 6, 0) == ["यह पुल है। वह नदी है।", "वह घर है।"]
    assert passages("هل هذا جسر؟ هذا نهر۔ نعم", words, 4, 0) == ["هل هذا جسر؟", "هذا نهر۔ نعم"]


@given(
    st.text("ab. \n!?。", min_size=1, max_size=120).filter(str.strip), st.integers(1, 12), st.integers(0, 6)
)
def test_nothing_is_lost(text, length, overlap):
    found = passages(text, characters, length, overlap)
    assert all(passage.strip() and passage in text for passage in found)
    alone = passages(text, characters, length, 0)
    assert "".join("".join(alone).split()) == "".join(text.split())
    assert len(found) >= len(alone)


def test_long_texts_that_differ_at_the_end_have_other_latents():
    tokenizer = model_zoo.word_piece_tokenizer()
    encoder = SentenceEncoder(model_zoo.small_encoder(), tokenizer)
    start = "Paris is the capital of France. " * 30
    # Of one token each, so that their texts have passages of the same places.
    first, second = sorted(word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 2)[:2]
    texts = [first, start + first, start + second]
    assert torch.equal(encoder.encode(texts[1:2]), encoder.encode(texts[2:]))
    latents, parts = encoder.encode_passages(texts, length=16, overlap=4)
    assert parts[0] == 1 and parts[1] == parts[2] > 5 and len(latents) == sum(parts)
    _, one, other = latents.split(parts)
    assert torch.allclose(one[:-1], other[:-1], atol=1e-6) and not torch.allclose(
        one[-1], other[-1], atol=1e-3
    )
    assert torch.allclose(latents[:1], encoder.encode([first]), atol=1e-6)
    # Not even a passage is cut that is asked for longer than the encoder reads.
    assert len(encoder.encode_passages(texts, length=10**6)[0]) > 3
