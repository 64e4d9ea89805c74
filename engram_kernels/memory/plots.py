"""Pictures: what a memory recalls as it fills, and how much hangs on each row."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple

from .._plots import SERIES, figure_file


class Point(NamedTuple):
    """A measurement of one series at one load.

    Attributes:
        series: its name.
        load: rows written for each slot, N/K.
        shares: of the rows, by what is measured.
        leverages: of the rows written: least, mean, largest; None where there is no memory.
    """

    series: str
    load: float
    shares: dict[str, float]
    leverages: tuple[float, float, float] | None = None


def capacity(points: Sequence[Point], path: str | os.PathLike, title: str = "") -> None:
    """Draw shares and leverages against the load as a PNG file, a panel for each share.

    Args:
        points: series over loads, all of the same shares.
        path: the file; its name ends in `.png`. It is replaced whole or not at all.
        title: above the picture.

    Raises:
        ValueError: the name does not end in `.png`, or there is no point.
        EngramError: matplotlib is not installed.
        OSError: the file cannot be written.

    Example:
        >>> capacity([Point("leave-one-out", 1.0, {"recall": 0.99}, (0.33, 0.47, 0.62))], "recall.png")
    """
    if not points:
        raise ValueError("points: expected at least one, got none")
    series: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.load):
        series.setdefault(point.series, []).append(point)
    names = list(points[0].shares)
    with figure_file(path, (3.9 * (len(names) + 1), 3.8)) as figure:
        *panels, leverage = figure.subplots(1, len(names) + 1)
        for (label, mine), (colour, marker) in zip(series.items(), cycle(SERIES), strict=False):
            look = {"color": colour, "marker": marker, "markersize": 4}
            for axes, name in zip(panels, names, strict=True):
                axes.plot(
                    [point.load for point in mine],
                    [point.shares[name] for point in mine],
                    label=label,
                    **look,
                )
            held = [(point.load, *point.leverages) for point in mine if point.leverages is not None]
            if held:
                loads, least, mean, largest = zip(*held, strict=True)
                leverage.plot(loads, mean, **look)
                leverage.fill_between(loads, least, largest, color=colour, alpha=0.15, linewidth=0)
        for axes, name in zip((*panels, leverage), (*names, "leverage: mean, least, largest"), strict=True):
            axes.set_title(name)
            axes.set_xlabel("rows for each slot, N/K")
            axes.set_ylim(0, 1.04)
            axes.axvline(1, color="0.6", linewidth=0.8, linestyle=":")
            axes.grid(axis="y", color="0.92")
            axes.set_axisbelow(True)
        figure.suptitle(title)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(series))
