"""Run a decoder that is conditioned on a readout: the pseudo-token in its cache, the offset in its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..errors import EngramError
from ..hf.cache import cache_inputs, empty_cache
from ..hf.forward import takes
from ..hf.modeling import Cache, ModelOutput
from .conditioning import Conditioning


def check_readout(readout: Tensor, texts: int, latent: int) -> None:
    """Check that there is a readout for each text."""
    check.floating("readout", readout)
    check.shape("readout", readout, (texts, latent), "[batch, latent]")


def decode(
    decoder: nn.Module,
    conditioning: Conditioning,
    readout: Tensor | None,
    cache: Cache | None,
    use_cache: bool | None,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    logits_to_keep: int = 0,
    **kwargs,
) -> ModelOutput:
    """Run the decoder on texts, each conditioned on its readout.

    Args:
        decoder: a causal language model.
        conditioning: of this decoder.
        readout: `[batch, latent]`; a row of zeros has none. None: the bare decoder.
        cache: what was returned for the tokens before; None: there are none.
        use_cache: whether to return it.
        input_ids: `[batch, length]`, padded on the left.
        attention_mask: `[batch, past + length]`, without the pseudo-token.
        logits_to_keep: compute logits at so many last positions; 0: at all.
        **kwargs: to the decoder.
    """
    if logits_to_keep and takes(decoder, "logits_to_keep"):
        kwargs["logits_to_keep"] = logits_to_keep
    present = None if readout is None else readout.any(-1)
    if present is None or not present.any():
        kwargs |= cache_inputs(decoder, cache, use_cache)
        return decoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
    check_readout(readout, len(input_ids), conditioning.latent)
    if decoder.training and any(getattr(part, "gradient_checkpointing", False) for part in decoder.modules()):
        raise EngramError(
            "decoder: expected no gradient checkpointing, for which transformers drops the cache that a "
            "readout goes into: switch it off, or freeze the decoder"
        )
    condition = conditioning(readout)
    embeddings = decoder.get_input_embeddings()(input_ids)
    cache = empty_cache(decoder.config) if cache is None else cache
    if cache.get_seq_length() == 0:
        for layer, pair in enumerate(zip(condition.keys, condition.values, strict=True)):
            cache.update(*(part.to(embeddings.dtype) for part in pair), layer)
    batch, length = input_ids.shape
    if attention_mask is None:
        seen = cache.get_seq_length() - 1 + length
        attention_mask = torch.ones(batch, seen, dtype=torch.long, device=input_ids.device)
    first = present.to(attention_mask.dtype)[:, None]
    if takes(decoder, "position_ids"):
        # Padding has no position; a row without a readout has none for the pseudo-token either.
        positions = attention_mask.cumsum(-1)[:, -length:] - 1
        kwargs["position_ids"] = positions.clamp_min(0) + first
    return decoder(
        inputs_embeds=embeddings + (condition.offset * first[..., None]).to(embeddings.dtype),
        attention_mask=torch.cat([first, attention_mask], -1),
        **cache_inputs(decoder, cache, use_cache),
        **kwargs,
    )
