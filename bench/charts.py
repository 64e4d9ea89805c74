"""Charts of a run, as SVG: the roofline and shares of the floor, and the speed-ups."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, ticker
from rows import by_operation

# Fixed identifiers, and below no date: the same figures give the same file.
STYLE = {"svg.hashsalt": "engram", "svg.fonttype": "none"}


def _save(figure, path: Path, source: str) -> None:
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, format="svg", metadata={"Date": None, "Source": source})
    pyplot.close(figure)


def _title(run: dict) -> str:
    found = run["machine"]
    device = found.get("gpu") or found.get("processor")
    return f"{device}, torch {found.get('torch')}, commit {found.get('commit')}"


def draw_roofline(run: dict, rows: list[dict], path: Path, source: str) -> None:
    """Operations a second against operations a byte, under measured roofs; and the shares of the floor."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    figure.suptitle(_title(run))
    rates = run["rates"][rows[0]["device"]]
    for dtype, peak in rates["gemm"].items():
        ridge = peak / rates["copy"]
        left.plot([1e-2, ridge, 1e4], [1e-2 * rates["copy"], peak, peak], label=f"{dtype} roof")
    for name, cases in by_operation([line for line in rows if line["work"]]).items():
        work = [sum(case["work"].values()) for case in cases]
        clock = [case["device_seconds"] or case["seconds"] for case in cases]
        left.scatter(
            [w / case["traffic"] for w, case in zip(work, cases, strict=True)],
            [w / seconds for w, seconds in zip(work, clock, strict=True)],
            s=14,
            label=name,
        )
    left.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second")
    left.legend(fontsize=7)
    groups = by_operation(rows)
    for place, cases in enumerate(groups.values()):
        right.scatter([100 * case["share_of_floor"] for case in cases], [place] * len(cases), s=14)
    right.axvline(100, color="grey", linewidth=0.8)
    right.set(xlabel="share of the floor, %", yticks=range(len(groups)), yticklabels=list(groups))
    right.set_xlim(left=0)
    right.invert_yaxis()
    _save(figure, path, source)


def _kind(baseline: str) -> str:
    """What baselines of one colour have in common: every upstream's algorithm, every eager one."""
    first = baseline.partition(" ")[0]
    return first if first in ("eager", "upstream") else baseline


def draw_speedups(run: dict, rows: list[dict], path: Path, source: str) -> None:
    """How many times longer each baseline takes, a point a case."""
    groups = by_operation(rows)
    kinds = list(dict.fromkeys(_kind(name) for line in rows for name in line["ratios"]))
    figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.42 * len(groups)), layout="constrained")
    axes.set_title(_title(run), fontsize=9)
    for index, kind in enumerate(kinds):
        points = [
            (ratio, place + 0.7 * ((index + 0.5) / len(kinds) - 0.5))
            for place, cases in enumerate(groups.values())
            for case in cases
            for name, ratio in case["ratios"].items()
            if _kind(name) == kind
        ]
        axes.scatter([x for x, _ in points], [y for _, y in points], s=12, label=kind)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="times as long as engram_kernels; right of the line it is faster")
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _place: f"{value:g}"))
    axes.set(yticks=range(len(groups)), yticklabels=list(groups))
    axes.set_yticks([place + 0.5 for place in range(len(groups) - 1)], minor=True)
    axes.grid(axis="y", which="minor", color="0.9")
    axes.invert_yaxis()
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, path, source)
