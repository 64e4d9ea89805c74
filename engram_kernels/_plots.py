"""What the pictures share: matplotlib asked for politely, one style, files written whole."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ._io import new_file
from .errors import EngramError

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.edgecolor": "0.4",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "legend.frameon": False,
    "figure.dpi": 150,
    "text.usetex": False,
    "svg.hashsalt": "engram",
}
# Without the hour, the same figures always give the same file.
UNDATED = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
# Okabe and Ito's colours, which colour-blind readers tell apart; markers tell them apart in print too.
SERIES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"))


def check(path: str | os.PathLike, argument: str = "path", suffixes: Sequence[str] = (".png",)) -> None:
    """Raise unless a picture of that name can be drawn here.

    Raises:
        ValueError: the name ends in none of the suffixes.
        EngramError: matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in suffixes:
        *others, last = suffixes
        expected = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{argument}: expected a name that ends in {expected}, got {os.fspath(path)!r}")
    import_matplotlib()


def import_matplotlib():
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise EngramError("pictures need matplotlib: pip install 'engram_kernels[plot]'") from error
    return matplotlib


@contextmanager
def figure_file(
    path: str | os.PathLike, size: tuple[float, float], suffixes: Sequence[str] = (".png",)
) -> Iterator:
    """Yield a figure of its own canvas, which leaves pyplot and its backend alone, and write it whole."""
    check(path, suffixes=suffixes)
    matplotlib = import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with new_file(path) as temporary:
            suffix = temporary.suffix.lower()
            figure.savefig(temporary, format=suffix[1:], metadata=UNDATED.get(suffix))
