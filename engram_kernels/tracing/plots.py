"""Causal traces as heat maps (ROME, figures 1 and 2)."""

from __future__ import annotations

import os
from collections.abc import Sequence

from .._plots import figure_file, import_matplotlib
from .result import AverageTrace, Trace

SUFFIXES = (".png", ".svg", ".pdf")
# As in the paper, from no effect to the largest.
COLOURS = {"hidden": "Purples", "mlp": "Greens", "attention": "Reds"}
NAMES = {"hidden": "hidden state", "mlp": "MLP", "attention": "attention"}
NO_TOKEN = "#e0e0e0"


def draw(traces: Trace | AverageTrace | Sequence[Trace | AverageTrace], path: str | os.PathLike) -> None:
    """Draw traces as heat maps side by side: tokens down, layers across, the subject's tokens with a star.

    The lightest colour is the corrupted probability and everything below it.

    Args:
        traces: one or several, such as those of the three kinds; averages have their roles down.
        path: the file; its name ends in `.png`, `.svg` or `.pdf`. It is replaced whole or not at all.

    Raises:
        ValueError: the name ends otherwise, or there is no trace.
        EngramError: matplotlib is not installed.
        OSError: the file cannot be written.

    Example:
        >>> draw([trace(model, tokenizer, prompt, subject, kind) for kind in KINDS], "trace.png")
    """
    traces = [traces] if isinstance(traces, Trace | AverageTrace) else list(traces)
    if not traces:
        raise ValueError("traces: expected at least one, got none")
    labels = [[_visible(label) for label in found.labels] for found in traces]
    # A map right of one with the same tokens needs none of its own.
    shown = [
        mine if mine != before else [""] * len(mine)
        for mine, before in zip(labels, [None, *labels], strict=False)
    ]
    width = sum(0.085 * found.indirect_effects.shape[1] + 1.3 for found in traces)
    width += 0.075 * sum(max(map(len, mine)) for mine in shown)
    height = 1.3 + 0.27 * max(map(len, labels))
    with figure_file(path, (max(4.5, width), height), SUFFIXES) as figure:
        all_axes = figure.subplots(1, len(traces), squeeze=False)[0]
        for axes, found, names in zip(all_axes, traces, shown, strict=True):
            _draw(figure, axes, found, names)


def _draw(figure, axes, found: Trace | AverageTrace, labels: list[str]) -> None:
    if isinstance(found, Trace):
        unit, values, low = f"p({found.answer})", found.effects, found.corrupted
        title = f"{unit} = {found.clean:.3f} clean, {found.corrupted:.3f} corrupted"
    else:
        unit, values, low = "average indirect effect", found.indirect_effects, 0.0
        title = f"mean of {found.facts} facts"
    what = NAMES[found.kind] if found.kind == "hidden" else f"{found.window} {NAMES[found.kind]} layers"
    # A range of no width would leave the largest effect without a colour.
    high = max(low + 1e-6, values.nan_to_num(nan=low).max().item())
    colours = import_matplotlib().colormaps[COLOURS[found.kind]].with_extremes(bad=NO_TOKEN)
    image = axes.imshow(values.numpy(), aspect="auto", cmap=colours, vmin=low, vmax=high)
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.set_xticks(range(0, values.shape[1], 5))
    axes.tick_params(length=0)
    axes.set_xlabel("layer" if found.kind == "hidden" else "middle of the window of layers")
    axes.set_title(f"{what} restored\n{title}", parse_math=False)
    figure.colorbar(image, ax=axes).set_label(unit, parse_math=False)


def _visible(label: str) -> str:
    """A token on one line, with its line breaks and other marks spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in label)
