"""The outcomes of edited cases, and their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

from ..errors import EngramError
from .measures import LOCALITY, PROMPT, Answer, Figures

# What a person sees comes first; what compares probabilities is named so.
MEASURES = ("begins", "contains", "exact", "overlap", "judged", "argmax", "tokens", "log_probability")


@dataclass(frozen=True)
class Outcome:
    """The outcome of editing one case.

    Attributes:
        case: its name.
        edit: its prompt and target, to read.
        before, after: what was measured; `after` is None where the edit was skipped.
        skipped: why the edit was skipped.
        seconds: the edit took, or had its share of edits done together; None of a run that was cut off.
        probability: of the whole target on the edited prompt when all writes were done; None where the
            editor does not tell.
        took: whether the editor's own record says that it took; None likewise.
        steps, loss: of the value's optimisation, the number and the last one; None likewise.
        reverted_exactly: whether what was written is as it was, bit for bit, after this case or all of them.
    """

    case: str
    edit: str
    before: Figures
    after: Figures | None = None
    skipped: str | None = None
    seconds: float | None = None
    probability: float | None = None
    took: bool | None = None
    steps: int | None = None
    loss: float | None = None
    reverted_exactly: bool | None = None

    @classmethod
    def read(cls, content: Mapping) -> Outcome:
        """Read an outcome that `asdict` turned into a dictionary."""
        figures = {name: _figures(content[name]) for name in ("before", "after")}
        return cls(**{**content, **figures})


class Retained(NamedTuple):
    """The share of the first `first` edits whose prompt is answered by the target when `edits` are done."""

    edits: int
    first: int
    begins: float


def summarise(outcomes: Sequence[Outcome]) -> dict:
    """The means over the cases that were edited: what a table or a JSON report shows.

    Args:
        outcomes: of `Evaluation`, a case each.

    Returns:
        `rows`, `skipped`, `aspects` (of each: `questions`, and by measure the means `unedited` and `edited`
        over the cases that have it), `fluency`, `drift`, `median_seconds`, `reverted_exactly`.

    Raises:
        EngramError: no case was edited.
    """
    done = [outcome for outcome in outcomes if outcome.after is not None]
    if not done:
        reason = outcomes[0].skipped if outcomes else "there is no case"
        raise EngramError(f"data: expected a case that can be edited, got none: {reason}")
    timed = [outcome.seconds for outcome in done if outcome.seconds is not None]
    pairs = [(outcome.before, outcome.after) for outcome in done]
    aspects = dict.fromkeys(aspect for before, _ in pairs for aspect in before.aspects)
    return {
        "rows": len(done),
        "skipped": len(outcomes) - len(done),
        "aspects": {aspect: _aspect(pairs, aspect) for aspect in aspects},
        "fluency": _states([(before.fluency, after.fluency) for before, after in pairs]),
        "drift": {
            name: _states([((before.drift or {}).get(name), after.drift[name]) for before, after in pairs])
            for name in (pairs[0][1].drift or {})
        },
        "median_seconds": median(timed) if timed else None,
        "reverted_exactly": sum(bool(outcome.reverted_exactly) for outcome in done),
    }


def _aspect(pairs: Sequence[tuple[Figures, Figures]], aspect: str) -> dict:
    own = [(before, after) for before, after in pairs if before.of(aspect)]
    found: dict = {"cases": len(own), "questions": sum(len(before.of(aspect)) for before, _ in own)}
    for measure in MEASURES:
        found[measure] = _states([tuple(state.mean(aspect, measure) for state in pair) for pair in own])
    # RippleEdits' rule: tests count where the edit itself is said.
    holding = [pair for pair in own if aspect == PROMPT or pair[1].mean(PROMPT, "passed")]
    found["passed"] = _states([tuple(state.mean(aspect, "passed") for state in pair) for pair in holding])
    found["likelier"] = _states([tuple(state.likelier(aspect) for state in pair) for pair in own])
    if aspect.startswith(LOCALITY):
        kept = [after.kept(before, aspect) for before, after in own]
        found |= {name: {"edited": fmean(one[name] for one in kept)} for name in kept[0]}
    return {name: value for name, value in found.items() if value is not None}


def _states(pairs: Sequence[tuple[float | None, float | None]]) -> dict[str, float] | None:
    """The means before and after, over the cases that have both."""
    both = [pair for pair in pairs if None not in pair]
    if not both:
        return None
    before, after = zip(*both, strict=True)
    return {"unedited": fmean(before), "edited": fmean(after)}


def _figures(content: Mapping | None) -> Figures | None:
    if content is None:
        return None
    return Figures(**{**content, "answers": [Answer(**answer) for answer in content["answers"]]})
