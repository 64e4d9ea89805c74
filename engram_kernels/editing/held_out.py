"""A fixed text, and a model's loss on it: what edits do to everything else."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ..errors import EngramError
from ..hf.forward import target_predictions
from ..hf.tokens import Row
from .statistics.corpus import read_texts, wikipedia_file

LENGTH = 128


def wikipedia_rows(tokenizer, rows: int = 8, length: int = LENGTH) -> list[list[int]]:
    """Tokens of Wikipedia text from the package `gensim`: of its last articles, which no covariance reads.

    Raises:
        EngramError: gensim is not installed.
    """
    path = wikipedia_file()
    if path is None:
        raise EngramError("text: expected a file, or the package gensim with its articles, got neither")
    return text_rows(tokenizer, list(read_texts(path))[::-1], rows, length)


def text_rows(tokenizer, texts: Sequence[str], rows: int = 8, length: int = LENGTH) -> list[list[int]]:
    """The first `rows` pieces of `length` tokens; of many texts one piece each, of one text all."""
    found: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text[: 16 * length * (rows if len(texts) == 1 else 1)])["input_ids"]
        pieces = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
        found += pieces[: rows if len(texts) == 1 else 1]
        if len(found) >= rows:
            return found[:rows]
    if not found:
        raise EngramError(f"text: expected a text of at least {length} tokens, got none")
    return found


def text_loss(model, rows: Sequence[Sequence[int]]) -> float:
    """The mean negative log-probability of a token, in nats; its exponential is the perplexity."""
    found = target_predictions(model, [Row(list(ids), 0, 1) for ids in rows])
    return -fmean(float(value) for chosen, _ in found for value in chosen)
