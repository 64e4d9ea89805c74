"""What a decoder gets of a readout: a pseudo-token in every layer's cache, an offset of its embeddings."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import EngramError
from ..hf.cache import cache_inputs, empty_cache, keeps_the_whole_past
from ..hf.eval_mode import eval_mode


class FirstToken(NamedTuple):
    """What a decoder keeps of a text's first token: `keys` and `values`, `[layers, heads, head size]`."""

    keys: Tensor
    values: Tensor


class Condition(NamedTuple):
    """What a batch of readouts does to a decoder.

    Attributes:
        keys: of the pseudo-token, `[layers, batch, heads, 1, head size]`, as the cache holds them: after the
            rotary position, which is 0 and turns nothing.
        values: likewise.
        offset: added to every token's embedding, `[batch, 1, embedding size]`.
    """

    keys: Tensor
    values: Tensor
    offset: Tensor


def first_token(decoder: nn.Module, token: int) -> FirstToken:
    """Run one token through a decoder and read its cache: this tells heads and sizes without names.

    Args:
        decoder: a causal language model of transformers.
        token: the token, such as the one that begins a text.

    Raises:
        EngramError: the decoder keeps something else than keys and values of one size of the whole past, as
            state-space models and sliding windows do.
    """
    device = decoder.get_input_embeddings().weight.device
    cache = empty_cache(decoder.config)
    with eval_mode(decoder), torch.no_grad():
        decoder(input_ids=torch.tensor([[token]], device=device), **cache_inputs(decoder, cache))
    if not keeps_the_whole_past(cache):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers})) or "none"
        raise EngramError(f"decoder: expected attention to the whole past in every layer, got caches {kinds}")
    shapes = {tuple(part.shape) for layer in cache.layers for part in (layer.keys, layer.values)}
    if len(shapes) != 1 or next(iter(shapes))[::2] != (1, 1):
        raise EngramError(f"decoder: expected keys and values of one shape in every layer, got {shapes}")
    keys = torch.stack([layer.keys[0, :, 0] for layer in cache.layers])
    values = torch.stack([layer.values[0, :, 0] for layer in cache.layers])
    return FirstToken(keys, values)


class Conditioning(nn.Module):
    """Projections from readouts to what a decoder is conditioned on.

    `x = √C z / ‖z‖`, `h = GELU(x Wₕ + bₕ)` (or `h = x` where `hidden` is 0, as in the paper), and
    `h W + b` is cut into each layer's key and value of one pseudo-token and an offset of the embeddings.
    `W` begins as zeros and `b` as the decoder's own keys and values of a text's first token: before training
    every readout does what that token does.

    Args:
        latent: size of the readouts.
        first: `first_token` of the decoder.
        embedding: size of the decoder's token embeddings.
        hidden: size of the hidden layer; 0 for none.

    Source: Das et al. 2024 (arXiv 2403.11901), section 3 and appendix: the readout as a past key and value.
    """

    def __init__(self, latent: int, first: FirstToken, embedding: int, hidden: int = 0):
        super().__init__()
        self.latent = latent
        self.layers, self.heads, self.head_size = first.keys.shape
        width = hidden or latent
        self.hidden = nn.Linear(latent, hidden) if hidden else None
        self.pseudo_token = nn.Linear(width, 2 * first.keys.numel())
        self.offset = nn.Linear(width, embedding)
        for projection in (self.pseudo_token, self.offset):
            nn.init.zeros_(projection.weight)
            nn.init.zeros_(projection.bias)
        with torch.no_grad():
            self.pseudo_token.bias.copy_(torch.stack([first.keys, first.values], 1).flatten())

    def forward(self, readout: Tensor) -> Condition:
        """Project readouts `[batch, latent]`; only their direction matters."""
        x = self.activated(self.scaled(readout))
        pairs = self.pseudo_token(x).view(-1, self.layers, 2, self.heads, self.head_size)
        keys, values = pairs.permute(2, 1, 0, 3, 4).unsqueeze(-2)
        return Condition(keys, values, self.offset(x).unsqueeze(1))

    def scaled(self, readout: Tensor) -> Tensor:
        """Readouts at the length √C, whose entries have the root mean square 1; zeros stay zeros."""
        length = readout.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(readout.dtype).tiny)
        return (math.sqrt(readout.shape[-1]) * readout / length).to(self.offset.weight.dtype)

    def activated(self, x: Tensor) -> Tensor:
        """The hidden layer, if there is one."""
        return x if self.hidden is None else nn.functional.gelu(self.hidden(x))
