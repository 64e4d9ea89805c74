"""What an edit does to the rest of a model: its loss on a fixed text, and facts that it knew."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from ..editing.corpus import read_texts, wikipedia_file
from ..errors import EngramError
from ..hf.forward import target_predictions
from ..hf.tokens import Row
from .answers import greedy, success
from .cases import Question
from .datasets import read_rows
from .fields import Fields

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


def drift_rows_of(tokenizer, path: str | os.PathLike | None, rows: int) -> list[list[int]]:
    """Rows of tokens of a file, or of gensim's articles."""
    if path is None:
        return wikipedia_rows(tokenizer, rows)
    return text_rows(tokenizer, ["\n\n".join(read_texts(path))], rows)


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


class Drift:
    """Measures of the rest of a model, which an edit should leave alone.

    Args:
        model: as it is before any edit.
        tokenizer: its tokenizer.
        texts: rows of tokens whose loss is taken; empty: none.
        facts: prompts and their answers; those that the model answers now are asked again later.

    Raises:
        EngramError: there are facts, and the model answers none of them.
    """

    def __init__(
        self,
        model,
        tokenizer,
        texts: Sequence[Sequence[int]] = (),
        facts: Sequence[Question] = (),
        batch_size: int = 32,
    ):
        self.tokenizer, self.texts, self.batch_size = tokenizer, list(texts), batch_size
        self.known = list(facts)
        self.known = [fact for fact, right in zip(facts, self._answered(model), strict=True) if right]
        if facts and not self.known:
            raise EngramError(f"known: expected facts that the model knows, got none among {len(facts)}")

    def __repr__(self) -> str:
        tokens = sum(map(len, self.texts))
        return f"Drift({tokens:,} tokens of text, {len(self.known):,} known facts)"

    def measure(self, model) -> dict[str, float]:
        """`text_loss` in nats a token, `perplexity`, and the share of the known facts still answered."""
        found = {}
        if self.texts:
            found["text_loss"] = text_loss(model, self.texts)
            found["perplexity"] = math.exp(found["text_loss"])
        if self.known:
            found["known_facts"] = fmean(self._answered(model))
        return found

    def _answered(self, model) -> list[bool]:
        written = greedy(model, self.tokenizer, [fact.prompt for fact in self.known], 8, self.batch_size)
        return [
            success(text.text, fact.answer, fact.aliases).begins
            for text, fact in zip(written, self.known, strict=True)
        ]


def read_known(path: str | os.PathLike, rows: int | None = None) -> list[Question]:
    """Facts as `known_1000.json` has them, a `prompt` and an `attribute` each.

    Raises:
        ValueError: the file cannot be read, or a row lacks one of them.
    """
    found = []
    for number, row in enumerate(read_rows(Path(path))[:rows]):
        if not isinstance(row, dict):
            raise ValueError(f"known: expected an object in row {number}, got {type(row).__name__}")
        fields = Fields(row, number)
        found.append(Question(fields.text("prompt"), fields.text("attribute", "answer")))
    return found
