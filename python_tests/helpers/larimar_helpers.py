"""What the tests of Larimar share: a small random model, facts, and their latents."""

import functools

import model_zoo
import torch

from engram_kernels.larimar.model import LarimarModel
from engram_kernels.larimar.training import Fact
from engram_kernels.memory import SentenceEncoder

LATENT = 24
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


def small_encoder(vocabulary=300, seed=1):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=LATENT,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertModel(config).eval()


def small_larimar(family="llama", moved=True, **options):
    """A model whose conditioning, if `moved`, is not what it begins as."""
    options = {"slots": 32, "hidden": 16, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LarimarModel.from_bases(small_encoder(), model_zoo.small_model(family), **options).eval()
    if moved:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.conditioning.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@functools.cache
def sentence_encoder():
    return SentenceEncoder(small_encoder(), model_zoo.word_piece_tokenizer())


def encode(texts):
    return sentence_encoder().encode(texts)
