"""Charts of a run, as SVG: the roofline and shares of the floor, and the speed-ups."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from report import by_operation

# Fixed identifiers, and below no date: the same figures give the same file.
STYLE = {"svg.hashsalt": "engram", "svg.fonttype": "none"}


def _save(figure, path: Path, source: str) -> None:
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, format="svg", metadata={"Date": None, "Source": source})
    pyplot.close(figure)


def draw_roofline(run: dict, rows: list[dict], path: Path, source: str) -> None:
    """Operations a second against operations a byte, under measured roofs; and the shares of the floor."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    rates = run["rates"][rows[0]["device"]]
    intensities = [10**exponent for exponent in (-2, -1, 0, 1, 2, 3, 4)]
    for dtype, peak in rates["gemm"].items():
        left.plot(intensities, [min(x * rates["copy"], peak) for x in intensities], label=f"{dtype} roof")
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


def draw_speedups(rows: list[dict], path: Path, source: str) -> None:
    """How many times longer each baseline takes, a point a case."""
    groups = by_operation(rows)
    baselines = list(dict.fromkeys(name for line in rows for name in line["ratios"]))
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.4 * len(groups)), layout="constrained")
    for index, name in enumerate(baselines):
        points = [
            (case["ratios"][name], place + 0.6 * (index / max(1, len(baselines)) - 0.4))
            for place, cases in enumerate(groups.values())
            for case in cases
            if name in case["ratios"]
        ]
        axes.scatter([x for x, _ in points], [y for _, y in points], s=14, label=name)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="seconds of the baseline over ours")
    axes.set(yticks=range(len(groups)), yticklabels=list(groups))
    axes.invert_yaxis()
    axes.legend(fontsize=7)
    _save(figure, path, source)
