"""Tables and charts from files of results, and from nothing else.

    python bench/report.py table FILE                    what a run did and measured
    python bench/report.py resources FILE LOG            keep what the compilers say that kernels use
    python bench/report.py docs                          write the GPU sections of the documentation anew
    python bench/report.py docs --check                  say whether they are what the files make of them

Importing it needs nothing but Python; charts need matplotlib.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import resources
import results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
DOCS = ROOT / "docs"
BEGIN, END = "<!-- GPU results: bench/report.py docs -->", "<!-- end of GPU results -->"
NO_RUN = "**No GPU run.** `bench/results/` has no file of one, so there is no figure."


# -- rows ----------------------------------------------------------------------------------------------------


def row(case: str, ours: str, variants: dict[str, dict], traffic: float, floor: float, work=None) -> dict:
    """Return what is kept of a case; the share of the floor is by the GPU's clock where there is one."""
    mine = variants[ours]
    seconds = mine["seconds"]["median"]
    device = mine.get("device_seconds", {}).get("median")
    clock = device or seconds
    others = {name: kept for name, kept in variants.items() if name != ours}
    return {
        "case": case,
        "ours": ours,
        "device": "cpu" if device is None else "cuda",
        "seconds": seconds,
        "device_seconds": device,
        "error": mine["error"],
        "traffic": traffic,
        "work": work or {},
        "floor": floor,
        "gigabytes_per_second": traffic / clock / 1e9,
        "share_of_floor": floor / clock,
        "ratios": {name: kept["seconds"]["median"] / seconds for name, kept in others.items()},
        "device_ratios": {
            name: kept["device_seconds"]["median"] / device
            for name, kept in others.items()
            if device is not None and "device_seconds" in kept
        },
        "variants": variants,
    }


def table(rows: list[dict]) -> list[str]:
    """One line a case, as Markdown; the ratios are of whole calls."""
    on_gpu = any(line["device_seconds"] is not None for line in rows)
    baselines = list(dict.fromkeys(name for line in rows for name in line["ratios"]))
    header = ["case", "seconds", *["GPU seconds"] * on_gpu, "MB", "GB/s", "of floor"]
    header += [f"× {name}" for name in baselines]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for line in rows:
        device, peak = line["device_seconds"], line["variants"][line["ours"]]["peak_bytes"]
        lines.append(
            [
                line["case"],
                f"{line['seconds']:.5f}",
                *["" if device is None else f"{device:.6f}"] * on_gpu,
                "" if peak is None else f"{peak / 2**20:.0f}",
                f"{line['gigabytes_per_second']:.1f}",
                f"{line['share_of_floor']:.0%}",
                *(f"{line['ratios'][name]:.2f}" if name in line["ratios"] else "" for name in baselines),
            ]
        )
    return ["| " + " | ".join(line) + " |" for line in lines]


def operation(line: dict) -> str:
    """The part of a case's name before its device."""
    return line["case"].partition(f" {line['device']} ")[0]


def by_operation(rows: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for line in rows:
        found.setdefault(operation(line), []).append(line)
    return found


def summary(rows: list[dict]) -> list[str]:
    """Of each operation the number of cases and the medians over them, as Markdown."""
    baselines = list(dict.fromkeys(name for line in rows for name in line["ratios"]))
    lines = [["operation", "cases", "of floor", *(f"× {name}" for name in baselines)]]
    lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
    for name, cases in by_operation(rows).items():
        cells = [name, str(len(cases)), f"{statistics.median(c['share_of_floor'] for c in cases):.0%}"]
        for other in baselines:
            ratios = [case["ratios"][other] for case in cases if other in case["ratios"]]
            cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
        lines.append(cells)
    return ["| " + " | ".join(line) + " |" for line in lines]


# -- a run ---------------------------------------------------------------------------------------------------


def conditions(run: dict) -> str:
    """Where and with what a run was made, in a sentence."""
    found = run["machine"]
    words = [found.get("gpu") or found.get("processor") or "unknown machine"]
    words += [f"{name} {found[name]}" for name in ("driver", "torch", "triton") if found.get(name)]
    rates = next((run["rates"][device] for device in ("cuda", "cpu") if device in run["rates"]), None)
    if rates:
        words.append(f"copy {rates['copy'] / 1e9:.1f} GB/s read and written")
        words += [f"{name} GEMM {rate / 1e12:.2f} TFLOP/s" for name, rate in rates["gemm"].items()]
    return f"Commit {found.get('commit', 'unknown')}, {run['begun'][:10]}: {', '.join(words)}."


def stages(run: dict) -> list[str]:
    lines = ["| stage | status | seconds | |", "| --- | --- | ---: | --- |"]
    for stage in run["stages"]:
        lines.append(f"| {stage['name']} | {stage['status']} | {stage['seconds']:.0f} | {stage['detail']} |")
    return lines


def whole(run: dict) -> list[str]:
    """All that is printed at the end of a run, what is shortest last."""
    lines = [*resources.table(run["resources"]), ""] if run["resources"] else []
    if run["cases"]:
        lines += [*table(run["cases"]), "", *summary(run["cases"])]
    else:
        lines.append("Nothing was measured.")
    return [*lines, "", *stages(run), "", conditions(run)]


# -- documentation -------------------------------------------------------------------------------------------


def gpu_runs(folder: Path) -> dict[str, dict]:
    """The newest run of each GPU with a measured case, by a short name for files."""
    newest: dict[str, dict] = {}
    for path in sorted(folder.glob("*.json")):
        run = results.load(path)
        gpu = run["machine"].get("gpu")
        if gpu and any(line["device"] == "cuda" for line in run["cases"]):
            name = results.name_of(gpu, "").removesuffix("-.json")
            if name not in newest or newest[name]["begun"] < run["begun"]:
                newest[name] = run
    return newest


def measured_on_gpu(run: dict) -> list[dict]:
    return [line for line in run["cases"] if line["device"] == "cuda"]


def performance_section(runs: dict[str, dict]) -> list[str]:
    """For docs/performance.md: every case, and the charts."""
    if not runs:
        return [NO_RUN]
    lines = []
    for name, run in runs.items():
        lines += ["", conditions(run), ""]
        lines += [f"![Roofline]({name}-roofline.svg)", "", f"![Speed-ups]({name}-speedups.svg)", ""]
        lines += table(measured_on_gpu(run))
    return lines[1:]


def readme_section(runs: dict[str, dict]) -> list[str]:
    """For the README: medians over the cases of each operation."""
    if not runs:
        return [NO_RUN]
    lines = []
    for run in runs.values():
        lines += ["", conditions(run), "", *summary(measured_on_gpu(run))]
    return [*lines[1:], "", "Every case: [docs/performance.md](docs/performance.md)."]


def replaced(text: str, section: list[str], name: str) -> str:
    """The text with what stands between its two marks exchanged.

    Raises:
        ValueError: the marks are not there once each, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"{name}: expected the marks {BEGIN!r} and {END!r}, once each")
    return "\n".join([before + BEGIN, *section, END + after])


def documents(runs: dict[str, dict], folder: Path) -> dict[Path, bytes]:
    """Every file that the results make, by its path in the repository; charts are drawn in `folder` first."""
    made = {}
    if runs:
        import charts
    for path, section in (
        (DOCS / "performance.md", performance_section(runs)),
        (ROOT / "README.md", readme_section(runs)),
    ):
        made[path] = replaced(path.read_text(encoding="utf-8"), section, path.name).encode()
    for name, run in runs.items():
        rows = measured_on_gpu(run)
        charts.draw_roofline(run, rows, folder / f"{name}-roofline.svg")
        charts.draw_speedups(rows, folder / f"{name}-speedups.svg")
        for chart in ("roofline", "speedups"):
            path = f"{name}-{chart}.svg"
            made[DOCS / path] = (folder / path).read_bytes()
    return made


def write_documents(check: bool = False) -> int:
    with tempfile.TemporaryDirectory() as folder:
        made = documents(gpu_runs(RESULTS), Path(folder))
    stale = [path for path, new in made.items() if not path.exists() or path.read_bytes() != new]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'not what the results make of it' if check else 'written'}")
        if not check:
            path.write_bytes(made[path])
    if not stale:
        print(f"{len(made)} files are what the results make of them")
    return int(check and bool(stale))


def main(command: str, *words: str) -> int:
    if command == "docs":
        return write_documents(check="--check" in words)
    if command == "resources":
        with results.changed(words[0]) as run:
            run["resources"] = resources.read(Path(words[1]).read_text(encoding="utf-8"))
        return 0
    print("\n".join(whole(results.load(words[0]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
