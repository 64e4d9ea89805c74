"""Names of a corpus, and the statistics of their keys."""

import pytest

pytest.importorskip("transformers")

import model_zoo
import torch

from engram_kernels.editing import METHODS, Editor
from engram_kernels.editing.names import FEWEST, NAMES, names_in
from engram_kernels.hf.projection import output_projection
from engram_kernels.hf.tokens import open_ids

TOWNS = [f"T{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(FEWEST)]
CORPUS = [f"They came from the town of {name}, which is small." for name in TOWNS]


@pytest.mark.parametrize(
    "text, names",
    [
        ("In 1889 the engineer Gustave Eiffel built it in Paris. Many came.", ["Gustave Eiffel", "Paris"]),
        ("He, Jean Moulin, died. Later I saw Paris and Paris", ["Jean Moulin", "Paris"]),
        ("Им управлял Пётр Первый (в России).", ["Пётр Первый", "России"]),
        ("中国的首都是北京", []),
        ("", []),
    ],
)
def test_names_are_capitalised_words_within_sentences(text, names):
    assert names_in(text) == names


def test_of_many_names_some_are_taken_from_beginning_to_end():
    names = names_in(" ".join(f"see T{number:04d}." for number in range(2 * NAMES)))
    assert len(names) == NAMES and (names[0], names[-1]) == ("T0000", f"T{2 * NAMES - 2:04d}")


def editor_of(cache, corpus):
    model, tokenizer = model_zoo.small_model(), model_zoo.byte_level_tokenizer()
    return Editor(model, tokenizer, corpus=corpus, cache_dir=cache, ridge=0.01, tokens=20_000)


def test_the_keys_of_names_are_added_to_the_statistics(cache):
    editor = editor_of(cache, CORPUS)
    projection = output_projection(editor.model, 2)
    keys = []
    hook = projection.module.register_forward_pre_hook(lambda _module, inputs: keys.append(inputs[0][0, -1]))
    with torch.no_grad():
        for name in TOWNS:
            editor.model(input_ids=torch.tensor([open_ids(editor.tokenizer, name)]))
    hook.remove()
    keys = torch.stack(keys).double()

    def matrix(names):
        covariance = editor.covariances([2], names)[2]
        found = torch.linalg.inv(covariance.inverse())
        # Without the ridge, a share of the mean diagonal.
        found.diagonal().sub_(0.01 / 1.01 * found.diagonal().mean())
        return found

    plain, with_names = matrix(0.0), matrix(0.7)
    wanted = plain + 0.7 * keys.T @ keys / len(keys)
    assert (with_names - wanted).norm() <= 1e-5 * wanted.norm()
    # What one method asks for is no other method's.
    assert torch.equal(plain, matrix(0.0)) and METHODS["engram"].names > 0 == METHODS["rome"].names


def test_a_corpus_of_few_names_has_none(cache):
    editor = editor_of(cache, CORPUS[: FEWEST - 1])
    plain, with_names = (editor.covariances([2], names)[2].inverse() for names in (0.0, 0.7))
    assert torch.equal(plain, with_names)
