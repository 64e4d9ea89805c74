"""What a model says after the texts of an edit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from ..errors import EngramError
from ..hf.forward import target_predictions
from ..hf.tokens import Row


class Reached(NamedTuple):
    """The target after one text.

    Attributes:
        log_probability: `log p(target | text)`, the sum over the target's tokens.
        said: whether each of them is the likeliest, so that greedy decoding answers with the target; where
            `Row.going` is known, also that none of those follows: "Romulus" is not "Rom".
    """

    log_probability: float
    said: bool


def reached(model: nn.Module, rows: Sequence[Row], names: Sequence[str], at_once: int = 32) -> list[Reached]:
    """What is reached in some rows; `names` are what an error calls them.

    Raises:
        EngramError: the model predicts NaN.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    found: dict[int, Reached] = {}
    for start in range(0, len(order), at_once):
        batch = order[start : start + at_once]
        predictions = target_predictions(model, [rows[i] for i in batch], after=True)
        for i, (chosen, likeliest) in zip(batch, predictions, strict=True):
            total = chosen.sum().item()
            if math.isnan(total):
                raise EngramError(f"model: expected finite predictions after {names[i]!r}, got NaN")
            *answer, follows = likeliest
            going = rows[i].going
            ends = going is None or follows not in going
            found[i] = Reached(total, ends and answer == rows[i].ids[rows[i].target :])
    return [found[i] for i in range(len(rows))]
