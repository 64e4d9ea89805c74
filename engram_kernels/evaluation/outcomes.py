"""The outcomes of edited cases, and their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, harmonic_mean, median
from typing import NamedTuple

from ..errors import EngramError
from .measures import ASPECTS, Figures


@dataclass(frozen=True)
class Outcome:
    """The outcome of editing one case.

    Attributes:
        case: its name.
        edit: its prompt and target, to read.
        before, after: what was measured; `after` is None where the edit was skipped.
        skipped: why the edit was skipped.
        seconds: the edit took, or had its share of edits done together; None of a run that was cut off.
        probability: of the whole target on the edited prompt when all writes were done.
        steps, loss: of the value's optimisation, the number and the last one.
        reverted_exactly: whether what was written is as it was, bit for bit, after this case or all of them.
    """

    case: str
    edit: str
    before: Figures
    after: Figures | None = None
    skipped: str | None = None
    seconds: float | None = None
    probability: float | None = None
    steps: int | None = None
    loss: float | None = None
    reverted_exactly: bool | None = None

    @classmethod
    def read(cls, content: Mapping) -> Outcome:
        """Read an outcome that `asdict` turned into a dictionary."""
        figures = {
            name: None if content[name] is None else Figures(**content[name]) for name in ("before", "after")
        }
        return cls(**{**content, **figures})


class Retained(NamedTuple):
    """The share of the first `first` edits that stand when `edits` are done."""

    edits: int
    first: int
    efficacy: float


def summarise(outcomes: Sequence[Outcome]) -> dict:
    """The means over the cases that were edited: what a table or a JSON report shows.

    Returns:
        `rows`, `skipped`, `unedited` and `edited` (by measure), `median_seconds`, `reverted_exactly`.

    Raises:
        EngramError: no case was edited.
    """
    done = [outcome for outcome in outcomes if outcome.after is not None]
    if not done:
        reason = outcomes[0].skipped if outcomes else "there is no case"
        raise EngramError(f"data: expected a case that can be edited, got none: {reason}")
    timed = [outcome.seconds for outcome in done if outcome.seconds is not None]
    return {
        "rows": len(done),
        "skipped": len(outcomes) - len(done),
        "unedited": _measures([(outcome.before, outcome.before) for outcome in done]),
        "edited": _measures([(outcome.before, outcome.after) for outcome in done]),
        "median_seconds": median(timed) if timed else None,
        "reverted_exactly": sum(bool(outcome.reverted_exactly) for outcome in done),
    }


def _measures(pairs: Sequence[tuple[Figures, Figures]]) -> dict[str, float]:
    """Every measure of the second figures; the first are those before the edit."""
    found = {aspect: fmean(figures.successes(aspect) for _, figures in pairs) for aspect in ASPECTS}
    found["score"] = harmonic_mean(list(found.values()))
    tokens = {
        f"{aspect}_tokens": fmean(figures.accuracy(aspect) for _, figures in pairs) for aspect in ASPECTS
    }
    tokens["locality_unchanged"] = fmean(figures.unchanged(before) for before, figures in pairs)
    names = ("efficacy_tokens", "paraphrase_tokens", "locality_unchanged")
    tokens["score_tokens"] = harmonic_mean([tokens[name] for name in names])
    found |= tokens
    if all(figures.fluency is not None for _, figures in pairs):
        found["fluency"] = fmean(figures.fluency for _, figures in pairs)
    return found
