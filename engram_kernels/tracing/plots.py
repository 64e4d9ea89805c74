"""Pictures of causal traces: heat maps as files, and as a page that shows each value (ROME, figures 1, 2)."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .._io import new_file
from .._plots import STYLE, import_matplotlib
from .result import AverageTrace, Trace

# As in the paper: purple, green, red; from no effect to the largest.
COLOURS = {
    "hidden": ("#fcfbfd", "#9e9ac8", "#3f007d"),
    "mlp": ("#f7fcf5", "#74c476", "#00441b"),
    "attention": ("#fff5f0", "#fb6a4a", "#67000d"),
}
NAMES = {"hidden": "hidden state", "mlp": "MLP", "attention": "attention"}
NOTHING = "#e0e0e0"
# What a format says of itself; none of them the hour, so that one trace always gives one file.
METADATA = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
SUFFIXES = (*METADATA, ".html")
CELL = (17, 22)

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Causal trace</title>
<style>
body { font: 14px sans-serif; margin: 2em; color: #222; background: #fff; }
h2 { font-size: 1.1em; margin: 1.5em 0 0.3em; }
svg { display: block; max-width: 100%; height: auto; }
svg text { font: 12px sans-serif; fill: #222; }
rect:hover { stroke: #000; stroke-width: 2; }
#value { position: sticky; top: 0; padding: 0.4em 0; min-height: 1.4em; background: #fff; }
</style>
</head>
<body>
<div id="value">Point at a cell to read its value.</div>
<!-- panels -->
<script>
const value = document.getElementById("value");
document.addEventListener("mouseover", event => {
  if (event.target.dataset.value) value.textContent = event.target.dataset.value;
});
</script>
</body>
</html>
"""


class Panel(NamedTuple):
    """One heat map: what it says, and its colours' range."""

    kind: str
    title: str
    unit: str
    across: str
    labels: tuple[str, ...]
    values: list[list[float]]
    low: float
    high: float

    @classmethod
    def of(cls, found: Trace | AverageTrace) -> Panel:
        what = NAMES[found.kind] if found.kind == "hidden" else f"{found.window} {NAMES[found.kind]} layers"
        across = "layer" if found.kind == "hidden" else "middle of the window of layers"
        if isinstance(found, Trace):
            unit, values, low = f"p({found.answer})", found.effects.tolist(), found.corrupted
            title = f"{what} restored: {unit} = {found.clean:.3f} clean, {found.corrupted:.3f} corrupted"
        else:
            unit, values, low = "average indirect effect", found.indirect_effects.tolist(), 0.0
            title = f"{what} restored: mean of {found.facts} facts"
        numbers = [number for row in values for number in row if math.isfinite(number)]
        # A range of no width would leave the largest effect without a colour.
        high = max([low + 1e-6, *numbers])
        return cls(found.kind, title, unit, across, tuple(map(_visible, found.labels)), values, low, high)


def check(path: str | os.PathLike, argument: str = "path") -> None:
    """Raise unless a picture of that name can be drawn here.

    Raises:
        ValueError: the name ends in none of `.png`, `.svg`, `.pdf` and `.html`.
        EngramError: matplotlib is not installed, and the name does not end in `.html`.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{argument}: expected a name that ends in .png, .svg, .pdf or .html, got {os.fspath(path)!r}"
        )
    if suffix in METADATA:
        import_matplotlib()


def draw(traces: Trace | AverageTrace | Sequence[Trace | AverageTrace], path: str | os.PathLike) -> None:
    """Draw traces as heat maps side by side: tokens down, layers across, the subject's tokens with a star.

    The lightest colour is the corrupted probability, and all below it. A page (`.html`) needs neither
    matplotlib nor a network, and shows the value of the cell that is pointed at.

    Args:
        traces: one or several, such as those of the three kinds; averages have their roles down.
        path: the file; its name ends in `.png`, `.svg`, `.pdf` or `.html`. It is replaced whole or not at
            all.

    Raises:
        ValueError: the name ends otherwise, or there is no trace.
        EngramError: matplotlib is not installed, and the name does not end in `.html`.
        OSError: the file cannot be written.

    Example:
        >>> draw([trace(model, tokenizer, prompt, subject, kind) for kind in KINDS], "trace.png")
    """
    check(path)
    panels = [Panel.of(found) for found in ([traces] if isinstance(traces, Trace | AverageTrace) else traces)]
    if not panels:
        raise ValueError("traces: expected at least one, got none")
    with new_file(path) as temporary:
        if temporary.suffix.lower() == ".html":
            content = PAGE.replace("<!-- panels -->", "\n".join(map(_section, panels)))
            temporary.write_text(content, encoding="utf-8")
        else:
            _figure(panels, temporary)


def _figure(panels: list[Panel], path: Path) -> None:
    matplotlib = import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap

    rows = max(len(panel.labels) for panel in panels)
    width = sum(0.085 * len(panel.values[0]) + 1.3 for panel in panels)
    width += 0.075 * sum(max(map(len, panel.labels)) for panel in _named(panels))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "engram"}):
        figure = matplotlib.figure.Figure(figsize=(max(4.5, width), 1.3 + 0.27 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            colours = LinearSegmentedColormap.from_list(panel.kind, COLOURS[panel.kind])
            colours = colours.with_extremes(bad=NOTHING)
            image = axes.imshow(panel.values, aspect="auto", cmap=colours, vmin=panel.low, vmax=panel.high)
            labels = panel.labels if panel in _named(panels) else [""] * len(panel.labels)
            axes.set_yticks(range(len(labels)), labels, parse_math=False)
            axes.set_xticks(range(0, len(panel.values[0]), 5))
            axes.tick_params(length=0)
            axes.set_xlabel(panel.across)
            axes.set_title(_folded(panel.title), parse_math=False)
            bar = figure.colorbar(image, ax=axes)
            bar.set_label(panel.unit, parse_math=False)
        figure.savefig(path, format=path.suffix[1:].lower(), metadata=METADATA[path.suffix.lower()])


def _named(panels: list[Panel]) -> list[Panel]:
    """The panels that need labels of their own: the others stand right of one with the same."""
    return [panel for i, panel in enumerate(panels) if i == 0 or panel.labels != panels[i - 1].labels]


def _folded(title: str) -> str:
    return title.replace(": ", "\n", 1)


def _section(panel: Panel) -> str:
    """A panel as a heading and an SVG element."""
    wide, high = CELL
    left = 12 + 8 * max(map(len, panel.labels))
    depth, bottom = len(panel.values[0]), high * len(panel.labels)
    parts = [f"<h2>{html.escape(panel.title)}</h2>"]
    size = (left + wide * depth + 10, bottom + 42)
    parts.append(f'<svg width="{size[0]}" height="{size[1]}" viewBox="0 0 {size[0]} {size[1]}">')
    for i, (label, row) in enumerate(zip(panel.labels, panel.values, strict=True)):
        text = html.escape(label)
        parts.append(f'<text x="{left - 6}" y="{high * i + 15}" text-anchor="end">{text}</text>')
        for layer, number in enumerate(row):
            said = html.escape(f"{label}, layer {layer}: {panel.unit} = {number:.4f}")
            parts.append(
                f'<rect x="{left + wide * layer}" y="{high * i}" width="{wide}" height="{high}" '
                f'fill="{_colour(panel, number)}" data-value="{said}"/>'
            )
    for layer in range(0, depth, 5):
        x = left + wide * (layer + 0.5)
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{layer}</text>')
    middle = left + wide * depth / 2
    parts.append(f'<text x="{middle}" y="{bottom + 34}" text-anchor="middle">{panel.across}</text></svg>')
    return "\n".join(parts)


def _colour(panel: Panel, number: float) -> str:
    if not math.isfinite(number):
        return NOTHING
    share = min(1.0, max(0.0, (number - panel.low) / (panel.high - panel.low)))
    light, middle, dark = COLOURS[panel.kind]
    start, end, way = (light, middle, 2 * share) if share < 0.5 else (middle, dark, 2 * share - 1)
    mixed = [round((1 - way) * int(start[i : i + 2], 16) + way * int(end[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _visible(label: str) -> str:
    """A token on one line, with its line breaks and other marks spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in label)
