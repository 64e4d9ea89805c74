"""Pictures of an evaluation: answers before and after, and how many of the first edits stand later."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import cycle

from .._plots import SERIES, figure_file
from .outcomes import Retained

BEFORE, AFTER = "0.72", SERIES[0][0]


def draw_measures(
    aspects: Mapping[str, Mapping],
    path: str | os.PathLike,
    retained: Sequence[Retained] = (),
    title: str = "",
) -> None:
    """Draw the share of right answers of each aspect as bars, and retention as lines beside, as a PNG file.

    Args:
        aspects: as `summarise` gives them: what each says that begins with the right answer.
        path: the file; its name ends in `.png`. It is replaced whole or not at all.
        retained: what `Evaluation.together` found; none: bars alone.
        title: above the picture.

    Raises:
        ValueError: the name does not end in `.png`, or there is no aspect.
        EngramError: matplotlib is not installed.
        OSError: the file cannot be written.

    Example:
        >>> draw_measures(summary["aspects"], "evaluation.png")
    """
    if not aspects:
        raise ValueError("aspects: expected at least one, got none")
    width = max(5.0, 1.6 + 1.2 * len(aspects))
    with figure_file(path, (width + 4.2 if retained else width, 3.6)) as figure:
        axes = figure.subplots(1, 2, width_ratios=[width, 4.2]) if retained else [figure.subplots()]
        _bars(axes[0], aspects)
        if retained:
            _lines(axes[1], retained)
        figure.suptitle(title)


def _bars(axes, aspects: Mapping[str, Mapping]) -> None:
    for state, shift, colour in (("unedited", -0.2, BEFORE), ("edited", 0.2, AFTER)):
        heights = [found["begins"][state] for found in aspects.values()]
        drawn = axes.bar([i + shift for i in range(len(aspects))], heights, 0.38, color=colour, label=state)
        axes.bar_label(drawn, [f"{height:.2f}" for height in heights], fontsize=7, padding=1)
    axes.set_xticks(range(len(aspects)), [aspect.replace(": ", ":\n") for aspect in aspects])
    axes.tick_params(axis="x", length=0, labelsize=7)
    axes.set_ylim(0, 1.08)
    axes.set_ylabel("answers that begin\nwith the right one")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def _lines(axes, retained: Sequence[Retained]) -> None:
    """Over the edits done, a line for each number of first edits; measured once, over that number."""
    if len({item.edits for item in retained}) > 1:
        lines = [(f"first {item.first:,}", item.edits, item.begins) for item in retained]
        axes.set_xlabel("edits done")
    else:
        lines = [(f"after {item.edits:,}", item.first, item.begins) for item in retained]
        axes.set_xlabel("first edits")
    for (colour, marker), label in zip(
        cycle(SERIES), dict.fromkeys(name for name, *_ in lines), strict=False
    ):
        line = sorted((at, share) for name, at, share in lines if name == label)
        axes.plot(*zip(*line, strict=True), color=colour, marker=marker, label=label)
    axes.set_xticks(sorted({at for _, at, _ in lines}))
    axes.set_ylim(0, 1.08)
    axes.set_ylabel("answers that begin\nwith the target")
    axes.set_title("retention")
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.legend()
