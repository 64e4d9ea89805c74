"""Which tokens go on with a word."""

import pytest

pytest.importorskip("transformers")

import model_zoo

from engram_kernels.hf.tokens import encode_row
from engram_kernels.hf.words import continuing_tokens


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "word_piece", "slow"])
def test_a_token_goes_on_with_a_word_where_its_letters_stand_beside_it(kind):
    tokenizer = getattr(model_zoo, f"{kind}_tokenizer")()
    going = set(continuing_tokens(tokenizer).tolist())
    assert 0 < len(going) < len(tokenizer)
    # By the vocabularies' own marks, which the function does not know: of a space, or of its absence.
    marks = {"byte_level": "Ġ", "metaspace": "▁", "word_piece": "##", "slow": " "}
    for token, piece in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if piece.isascii() and piece.isalnum():
            assert (token in going) == (kind != "word_piece"), piece
        elif piece.startswith(marks[kind]):
            letter = piece[2:].isascii() and piece[2:].isalnum()
            assert (token in going) == (kind == "word_piece" and letter) or not piece.isascii(), piece
        elif piece in tokenizer.all_special_tokens or piece in (".", ",", '"'):
            assert token not in going, piece


def test_bytes_within_a_character_go_on_and_characters_of_scripts_without_spaces_do_not():
    tokenizer = model_zoo.byte_level_tokenizer()
    going = set(continuing_tokens(tokenizer).tolist())
    pieces = tokenizer.encode("東", add_special_tokens=False)
    assert len(pieces) > 1 and set(pieces) <= going
    whole = tokenizer.get_vocab()
    for token in whole.values():
        text = tokenizer.decode([token])
        if text[:1] in ("京", "中", "の"):
            assert token not in going


def test_tokens_beyond_a_gap_in_the_numbers_count():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"x": 0, "a": 3, ".": 4, "b": 9}, []))
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    assert len(tokenizer) == 4 and continuing_tokens(tokenizer).tolist() == [0, 3, 9]


def test_a_tokenizer_is_asked_once(monkeypatch):
    tokenizer = model_zoo.byte_level_tokenizer()
    first = continuing_tokens(tokenizer)
    monkeypatch.setattr(type(tokenizer), "batch_decode", None)
    assert continuing_tokens(tokenizer) is first


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_tokens_that_are_added_count(kind):
    tokenizer = getattr(model_zoo, f"{kind}_tokenizer")()
    first = continuing_tokens(tokenizer)
    tokenizer.add_tokens(["ulus", ".com"])
    added, other = tokenizer.convert_tokens_to_ids(["ulus", ".com"])
    again = continuing_tokens(tokenizer).tolist()
    assert added not in first and added in again and other not in again


@pytest.mark.parametrize(
    ("target", "asked"),
    [
        ("Rome", True),
        ("85", True),
        ("Rome.", False),
        ("中国", False),
        ("서울", False),
        ("Rome (city)", False),
    ],
)
def test_a_row_knows_them_where_its_target_ends_with_a_word(target, asked):
    tokenizer = model_zoo.byte_level_tokenizer()
    row = encode_row(tokenizer, "The tower", "{} is in", target, whole=True)
    assert (row.going is continuing_tokens(tokenizer)) == asked
    assert encode_row(tokenizer, "The tower", "{} is in", target).going is None
    assert row == encode_row(tokenizer, "The tower", "{} is in", target)
