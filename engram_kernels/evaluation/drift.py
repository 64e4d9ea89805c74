"""What an edit does to the rest of a model: its loss on a fixed text, and facts that it knew."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from ..editing.held_out import text_loss, text_rows, wikipedia_rows
from ..editing.statistics.corpus import read_texts
from ..errors import EngramError, naming
from .answers import greedy, success
from .cases import Question
from .datasets import read_rows
from .fields import Fields


def drift_rows_of(tokenizer, path: str | os.PathLike | None, rows: int) -> list[list[int]]:
    """Rows of tokens of a file, or of gensim's articles."""
    if path is None:
        return wikipedia_rows(tokenizer, rows)
    return text_rows(tokenizer, ["\n\n".join(read_texts(path))], rows)


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
    with naming("known", "data"):
        for number, row in enumerate(read_rows(Path(path))[:rows]):
            if not isinstance(row, dict):
                raise ValueError(f"data: expected an object in row {number}, got {type(row).__name__}")
            fields = Fields(row, number)
            found.append(Question(fields.text("prompt"), fields.text("attribute", "answer")))
    return found
