"""Whether a fact speaks of every word of a question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from textwrap import wrap

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..hf.scripts import SENTENCE_ENDS
from ..hf.tokens import pad_rows
from ..memory.encoder import SentenceEncoder
from .words import content_words

# Longer texts are looked at two sentences at a time.
_LONG = 400
# Texts whose states are in memory at a time.
_TEXTS = 64
_BETWEEN = re.compile(rf"(?<=[.!?])\s+|(?<=[{SENTENCE_ENDS}])\s*")


@torch.no_grad()
def coverage(encoder: SentenceEncoder, question: str, texts: Sequence[str]) -> list[float]:
    """How near the question's least covered word is to its nearest token of each text.

        c = minₜ maxₛ cos(hₜ, gₛ)

    The latent of a sentence says what it is about; this says whether all of it is spoken of. "How old is the
    mayor?" is near to a fact about the mayor, but nothing in that fact need be near to "old".

    Args:
        encoder: whose last hidden states `h` of the question's content words and `g` of a text are compared.
        question: what is asked.
        texts: what may answer it.

    Returns:
        A cosine for each text; 1 where the question has no content words.

    Source: late interaction, Khattab and Zaharia 2020 (arXiv 2004.12832), with the least in place of the sum.
    """
    content = [word.span() for word in content_words(question)]
    if not content or not texts:
        return [1.0] * len(texts)
    (asked,) = _states(encoder, [question], [content])
    found = []
    for at in range(0, len(texts), _TEXTS):
        some = texts[at : at + _TEXTS]
        told = _states(encoder, some, [[(0, len(text))] for text in some])
        found += [float((asked @ states.mT).amax(-1).min()) for states in told]
    return found


def excerpts(text: str) -> list[str]:
    """A text as a whole, or, where it is long, each two neighbouring sentences of it.

    What has no sentences, such as a table or a list, is cut by its lines, and a long line between words.
    """
    if len(text) <= _LONG:
        return [text]
    sentences = [part for sentence in _BETWEEN.split(text.strip()) for part in _parts(sentence)]
    if len(sentences) < 3:
        return [text]
    return [" ".join(sentences[at : at + 2]) for at in range(len(sentences) - 1)]


def _parts(sentence: str) -> list[str]:
    """A sentence as it is, or in parts of at most `_LONG` characters."""
    if len(sentence) <= _LONG:
        return [sentence] if sentence else []
    lines = filter(None, map(str.strip, sentence.splitlines()))
    return [part for line in lines for part in wrap(line, _LONG, break_on_hyphens=False)]


def _states(
    encoder: SentenceEncoder, texts: Sequence[str], places: Sequence[Sequence[tuple[int, int]]]
) -> list[Tensor]:
    """The last states of the tokens at some places of each text, of length 1: [tokens, C]."""
    encoded = [
        encoder.tokenizer(text, truncation=True, max_length=encoder.max_length, return_offsets_mapping=True)
        for text in texts
    ]
    ids, mask = pad_rows([one["input_ids"] for one in encoded], next(encoder.model.parameters()).device)
    states = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state.float().cpu()
    return [
        normalize(row[_tokens_at(one["offset_mapping"], spans)], dim=-1)
        for row, one, spans in zip(states, encoded, places, strict=True)
    ]


def _tokens_at(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """The tokens that lie in one of the spans, in part at least; special tokens lie nowhere."""
    return [
        at
        for at, (start, stop) in enumerate(offsets)
        if any(start < end and stop > max(start, begin) for begin, end in spans)
    ]
