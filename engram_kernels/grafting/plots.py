"""Plots: where a graft lies in its model, and what it keeps of a skill at each size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from .._plots import SERIES, figure_file
from .density import Grid, layer_name, percent
from .graft import Graft

LINES = (("0.45", ":"), ("0.1", "--"), ("#56B4E9", "-."))
NOTHING = "0.88"


class Point(NamedTuple):
    """A measurement of one series; without `sparsity` it holds at every size: the base, the fine-tuned model.

    Several points of one series and sparsity, from several seeds, are drawn with their mean.
    """

    series: str
    sparsity: float | None
    accuracy: float
    ece: float


def heat_map(graft: Graft, path: str | os.PathLike) -> None:
    """Draw the density of a graft by layer and kind of module, and the entries of each layer, as a PNG file.

    Args:
        graft: any; kinds of modules without an entry are shown grey.
        path: the file; its name ends in `.png`. It is replaced whole or not at all.

    Raises:
        ValueError: the name does not end in `.png`.
        EngramError: matplotlib is not installed.
        OSError: the file cannot be written.

    Example:
        >>> heat_map(Graft.from_pretrained("my-skill"), "my-skill.png")
    """
    grid = Grid.of(graft.density())
    height, width = max(1.2, 0.17 * len(grid.layers)), max(2.0, 0.46 * len(grid.kinds))
    with figure_file(path, (width + 3.4, height + 2.2)) as figure:
        from matplotlib.patches import Patch

        cells, bars = figure.subplots(1, 2, sharey=True, width_ratios=[width, 1.3])
        mesh = _cells(cells, grid)
        cells.set_xticks(
            range(len(grid.kinds)), grid.labels(), rotation=45, ha="right", rotation_mode="anchor"
        )
        every = 1 if len(grid.layers) <= 40 else 5
        shown = [i for i, layer in enumerate(grid.layers) if layer < 0 or layer % every == 0]
        cells.set_yticks(shown, [layer_name(grid.layers[i]) for i in shown])
        cells.set_ylabel("layer")
        cells.tick_params(length=0)
        entries = [grid.entries(layer) for layer in grid.layers]
        bars.barh(range(len(entries)), entries, color="0.55")
        bars.set_xlabel("entries")
        bars.set_xlim(0, 1.05 * max([1, *entries]))
        bars.locator_params(axis="x", nbins=3, integer=True)
        bars.xaxis.set_major_formatter("{x:,.0f}")
        bars.tick_params(axis="y", length=0, labelleft=False)
        if mesh is not None:
            share = lambda value, _: percent(value)  # noqa: E731
            figure.colorbar(
                mesh, ax=bars, label="share of weights set", aspect=6 * height, pad=0.08, format=share
            )
        cells.legend(
            handles=[Patch(color=NOTHING, label="none set")],
            loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.3, handlelength=1, handleheight=1,
        )  # fmt: skip
        total = sum(cell.size for cell in grid.cells.values())
        title = f"{graft.size:,} of {total:,} weights, {percent(graft.sparsity)}"
        figure.suptitle(f"{Path(graft.base_model).name}: {title}" if graft.base_model else title)


def curve(points: Sequence[Point], path: str | os.PathLike) -> None:
    """Draw accuracy and calibration error against sparsity as a PNG file.

    Args:
        points: series over sparsities; those without a sparsity become horizontal lines.
        path: the file; its name ends in `.png`. It is replaced whole or not at all.

    Raises:
        ValueError: the name does not end in `.png`, or there is no point.
        EngramError: matplotlib is not installed.
        OSError: the file cannot be written.

    Example:
        >>> curve([Point("base", None, 0.57, 0.10), Point("learned", 1e-4, 0.84, 0.04)], "curve.png")
    """
    if not points:
        raise ValueError("points: expected at least one, got none")
    with figure_file(path, (8.6, 4.0)) as figure:
        for axes, name in zip(figure.subplots(1, 2), ("accuracy", "ece"), strict=True):
            lines, series = _series(points, name)
            for (label, values), (colour, dashes) in zip(lines.items(), cycle(LINES), strict=False):
                axes.axhline(fmean(values[None]), color=colour, linestyle=dashes, linewidth=1.2, label=label)
            for (label, values), (colour, marker) in zip(series.items(), cycle(SERIES), strict=False):
                at = sorted(values)
                axes.plot(at, [fmean(values[x]) for x in at], color=colour, marker=marker, label=label)
                single = [(x, y) for x in at if len(values[x]) > 1 for y in values[x]]
                if single:
                    axes.scatter(*zip(*single, strict=True), color=colour, marker=marker, s=12, alpha=0.35)
            _sizes(axes, sorted({point.sparsity for point in points if point.sparsity is not None}))
            axes.set_title({"accuracy": "accuracy", "ece": "expected calibration error"}[name])
            axes.set_xlabel("share of weights set")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(axis="y", color="0.92")
            axes.set_axisbelow(True)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)


def _cells(axes, grid: Grid):
    """Draw the cells; return what a colour bar needs, or None where no weight is set."""
    import numpy as np
    from matplotlib.colors import ListedColormap, LogNorm

    shares = np.full((len(grid.layers), len(grid.kinds)), np.nan)
    for (layer, kind), cell in grid.cells.items():
        shares[grid.layers.index(layer), grid.kinds.index(kind)] = cell.share
    extent = (-0.5, len(grid.kinds) - 0.5, len(grid.layers) - 0.5, -0.5)
    look = {"aspect": "auto", "interpolation": "nearest", "extent": extent}
    axes.imshow(np.where(shares == 0, 0.0, np.nan), cmap=ListedColormap([NOTHING]), **look)
    for edge in range(1, len(grid.kinds)):
        axes.axvline(edge - 0.5, color="white", linewidth=1)
    positive = shares[shares > 0]
    if not positive.size:
        return None
    low, high = positive.min(), positive.max()
    if high < 4 * low:
        low, high = low / 2, high * 2
    return axes.imshow(
        np.where(shares > 0, shares, np.nan), norm=LogNorm(low, high), cmap="viridis_r", **look
    )


def _series(points: Sequence[Point], name: str) -> tuple[dict, dict]:
    """Horizontal lines and curves: by label, by sparsity, the values."""
    lines: dict[str, dict] = {}
    series: dict[str, dict] = {}
    for point in points:
        kind = lines if point.sparsity is None else series
        kind.setdefault(point.series, {}).setdefault(point.sparsity, []).append(getattr(point, name))
    return lines, series


def _sizes(axes, sparsities: list[float]) -> None:
    if sparsities:
        axes.set_xscale("log")
        axes.set_xticks(sparsities, [percent(x) for x in sparsities])
        axes.minorticks_off()
    else:
        axes.set_xticks([])
