"""Pictures of an evaluation: the measures before and after, and how many of the first edits stand later."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import cycle

from .._plots import SERIES, figure_file
from .outcomes import Retained

# Fluency is in bits and has no place on an axis of shares.
SHARES = {
    "efficacy": "efficacy",
    "paraphrase": "paraphrase",
    "locality": "locality",
    "score": "score",
    "efficacy_tokens": "efficacy,\ntokens",
    "paraphrase_tokens": "paraphrase,\ntokens",
    "locality_tokens": "locality,\ntokens",
    "locality_unchanged": "locality,\nunchanged",
    "score_tokens": "score,\ntokens",
}
BEFORE, AFTER = "0.72", SERIES[0][0]


def draw_measures(
    unedited: Mapping[str, float],
    edited: Mapping[str, float],
    path: str | os.PathLike,
    retained: Sequence[Retained] = (),
    title: str = "",
) -> None:
    """Draw the measures as bars, and retention as lines beside them, as a PNG file.

    Args:
        unedited, edited: by measure, as `summarise` gives them.
        path: the file; its name ends in `.png`. It is replaced whole or not at all.
        retained: what `Evaluation.together` found; none: bars alone.
        title: above the picture.

    Raises:
        ValueError: the name does not end in `.png`, or there is no measure.
        EngramError: matplotlib is not installed.
        OSError: the file cannot be written.

    Example:
        >>> draw_measures(summary["unedited"], summary["edited"], "evaluation.png")
    """
    names = [name for name in SHARES if name in edited]
    if not names:
        raise ValueError("edited: expected at least one measure, got none")
    with figure_file(path, (12.4 if retained else 8.2, 3.6)) as figure:
        axes = figure.subplots(1, 2, width_ratios=[2, 1]) if retained else [figure.subplots()]
        _bars(axes[0], names, unedited, edited)
        if retained:
            _lines(axes[1], retained)
        figure.suptitle(title)


def _bars(axes, names: Sequence[str], unedited: Mapping[str, float], edited: Mapping[str, float]) -> None:
    for label, values, shift, colour in (
        ("unedited", unedited, -0.2, BEFORE),
        ("edited", edited, 0.2, AFTER),
    ):
        heights = [values[name] for name in names]
        drawn = axes.bar([i + shift for i in range(len(names))], heights, 0.38, color=colour, label=label)
        axes.bar_label(drawn, [f"{height:.2f}" for height in heights], fontsize=7, padding=1)
    axes.set_xticks(range(len(names)), [SHARES[name] for name in names])
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.08)
    axes.set_ylabel("share")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def _lines(axes, retained: Sequence[Retained]) -> None:
    """Over the edits done, a line for each number of first edits; measured once, over that number."""
    if len({item.edits for item in retained}) > 1:
        lines = [(f"first {item.first:,}", item.edits, item.efficacy) for item in retained]
        axes.set_xlabel("edits done")
    else:
        lines = [(f"after {item.edits:,}", item.first, item.efficacy) for item in retained]
        axes.set_xlabel("first edits")
    for (colour, marker), label in zip(
        cycle(SERIES), dict.fromkeys(name for name, *_ in lines), strict=False
    ):
        line = sorted((at, efficacy) for name, at, efficacy in lines if name == label)
        axes.plot(*zip(*line, strict=True), color=colour, marker=marker, label=label)
    axes.set_xticks(sorted({at for _, at, _ in lines}))
    axes.set_ylim(0, 1.08)
    axes.set_ylabel("efficacy")
    axes.set_title("retention")
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.legend()
