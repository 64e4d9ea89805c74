"""Measures of an edit: does it hold, does it generalise, does it leave other facts alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from ..errors import EngramError
from ..hf.forward import target_predictions
from ..hf.tokens import Row, context_length, encode_row
from .datasets import Case

ASPECTS = ("efficacy", "paraphrase", "locality")


class ScoredAnswer(NamedTuple):
    """How likely an answer is: its tokens' mean log-probability, the tokens, and the likeliest instead."""

    mean: float
    tokens: list[int]
    likeliest: list[int]

    @property
    def share(self) -> float:
        """The share of the answer's tokens that are the likeliest, the right ones before them given."""
        return fmean(a == b for a, b in zip(self.tokens, self.likeliest, strict=True))


@dataclass(frozen=True)
class Figures:
    """What was measured of one case in one state of the model.

    Attributes:
        margins: of each aspect and prompt, by how much the mean log-probability of the whole right answer
            exceeds the other's: the target's and the truth's, on neighbours the truth's and the target's.
        shares: of each aspect and prompt, the share of the right answer's tokens that are the likeliest.
        neighbours: the likeliest tokens at each neighbour's answer, to compare before and after.
        fluency: mean entropy of n-grams of generated text in bits; None where none was generated.
    """

    margins: dict[str, list[float]]
    shares: dict[str, list[float]]
    neighbours: list[list[int]]
    fluency: float | None = None

    def successes(self, aspect: str) -> float:
        """The share of an aspect's prompts on which the right answer is the likelier one."""
        return fmean(margin > 0 for margin in self.margins[aspect])

    def accuracy(self, aspect: str) -> float:
        """The mean share of the right answer's tokens that are the likeliest."""
        return fmean(self.shares[aspect])

    def unchanged(self, before: Figures) -> float:
        """The share of the neighbours' answer tokens whose likeliest token is that of before."""
        pairs = zip(before.neighbours, self.neighbours, strict=True)
        return fmean(fmean(a == b for a, b in zip(*pair, strict=True)) for pair in pairs)


def measure(model, tokenizer, cases: Sequence[Case], batch_size: int = 32) -> list[Figures]:
    """Measure efficacy, paraphrase and locality of all cases, in batches of texts of like length.

    Args:
        model: a causal language model, in the mode that it is in.
        tokenizer: its tokenizer.
        cases: what to ask.
        batch_size: texts a batch.

    Returns:
        The figures of each case, without fluency.

    Raises:
        EngramError: a text is longer than the model's context, or a prediction is not finite.
    """
    asked = [_questions(case) for case in cases]
    pairs = [(prompt, answer) for rows in asked for _, prompt, *both in rows for answer in both]
    answers = score(model, tokenizer, pairs, batch_size)
    figures = []
    for rows in asked:
        margins: dict[str, list[float]] = {aspect: [] for aspect in ASPECTS}
        shares: dict[str, list[float]] = {aspect: [] for aspect in ASPECTS}
        neighbours = []
        for aspect, prompt, right, other in rows:
            mine = answers[prompt, right]
            margins[aspect].append(mine.mean - answers[prompt, other].mean)
            shares[aspect].append(mine.share)
            if aspect == "locality":
                neighbours.append(mine.likeliest)
        figures.append(Figures(margins, shares, neighbours))
    return figures


def score(
    model, tokenizer, pairs: Iterable[tuple[str, str]], batch_size: int = 32
) -> dict[tuple[str, str], ScoredAnswer]:
    """Score each answer after its prompt; the space between them is understood.

    Raises:
        EngramError: a text is longer than the model's context, or a prediction is not finite.
    """
    rows = [(pair, _encode(model, tokenizer, *pair)) for pair in dict.fromkeys(pairs)]
    rows.sort(key=lambda entry: len(entry[1].ids))
    answers = {}
    for at in range(0, len(rows), batch_size):
        batch = rows[at : at + batch_size]
        found = target_predictions(model, [row for _, row in batch])
        for (pair, row), (chosen, likeliest) in zip(batch, found, strict=True):
            answer = ScoredAnswer(chosen.mean().item(), row.ids[row.target :], likeliest)
            if not math.isfinite(answer.mean):
                raise EngramError(f"model: expected finite predictions after {pair[0]!r}, got {answer.mean}")
            answers[pair] = answer
    return answers


def _questions(case: Case) -> list[tuple[str, str, str, str]]:
    """Aspect, prompt, right answer and the other one."""
    target, truth = case.edit.target, case.truth
    return [
        ("efficacy", case.edit.prompt_text, target, truth),
        *(("paraphrase", prompt, target, truth) for prompt in case.paraphrases),
        *(("locality", prompt, answer, target) for prompt, answer in case.neighbours),
    ]


def _encode(model, tokenizer, prompt: str, answer: str) -> Row:
    row = encode_row(tokenizer, prompt, "{}", answer)
    limit = context_length(model)
    if limit is not None and len(row.ids) > limit:
        raise EngramError(
            f"prompt: expected at most {limit} tokens with the answer, the model's context, "
            f"got {len(row.ids)} in {prompt!r}"
        )
    return row
