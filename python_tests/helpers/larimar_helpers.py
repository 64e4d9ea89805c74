"""What the tests of Larimar share: small models, facts, cases."""

import functools

import model_zoo
import torch

from engram_kernels.editing import Edit
from engram_kernels.evaluation import Case, Question
from engram_kernels.larimar import Fact, LarimarModel, ScopeDetector, ScopedModel
from engram_kernels.memory import SentenceEncoder

LATENT, VOCABULARY = 24, 400


def small_larimar(family="llama", moved=True, **options):
    """A model whose conditioning, if `moved`, is not what it begins as."""
    options = {"slots": 32, "hidden": 16, **options}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LarimarModel.from_bases(
            model_zoo.small_encoder(LATENT, seed=1), model_zoo.small_model(family), **options
        ).eval()
    if moved:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.conditioning.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def padded_batch():
    ids = torch.randint(1, VOCABULARY, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, :1] = 0
    return ids, mask, torch.randn(3, LATENT)


def facts_batch(rows=2, facts=3):
    values, keys = torch.randn(2, rows, facts, LATENT, dtype=torch.float64)
    return values, keys, keys[:, 0] + 0.1 * torch.randn(rows, LATENT, dtype=torch.float64)


FACTS = [
    Fact(f"{place} is located in the city of", city, question)
    for place, city, question in (
        ("The Louvre", "Rome", None),
        ("The Colosseum", "Paris", "Where are the towers of the Colosseum? They are in"),
        ("The Eiffel Tower", "Italy", None),
        ("A museum", "Brazil", "The museum lies in"),
        ("Switzerland", "Japan", None),
    )
]


@functools.cache
def sentence_encoder():
    return SentenceEncoder(model_zoo.small_encoder(LATENT, seed=1), model_zoo.word_piece_tokenizer())


def encode(texts):
    return sentence_encoder().encode(texts)


def scoped_model():
    encoder = sentence_encoder()
    model = LarimarModel.from_bases(encoder.model, model_zoo.small_model(), slots=32, hidden=16).eval()
    with torch.no_grad():
        for parameter in model.conditioning.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return ScopedModel(model, model_zoo.byte_level_tokenizer(), encoder, ScopeDetector(0.9999))


def cases():
    return [
        Case(
            name=str(number),
            kind="counterfact",
            edit=Edit(subject, "{} is located in the city of", target),
            truth="Rome",
            paraphrases=(f"You know that the towers of {subject} are in",),
            neighbours=(Question(f"The maps show {subject[::-1]} in", "Paris"),),
        )
        for number, (subject, target) in enumerate(
            (("The Louvre", "Rome"), ("The Colosseum", "Paris"), ("A museum", "Brazil"), ("A tower", "Japan"))
        )
    ]
