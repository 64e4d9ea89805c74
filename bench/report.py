"""Tables and charts from files of results, and from nothing else.

    python bench/report.py table FILE                    what a run did and measured
    python bench/report.py compare BEFORE AFTER          what became slower or faster, of one machine
    python bench/report.py resources FILE LOG            keep what the compilers say that kernels use
    python bench/report.py docs                          write the sections of the documentation anew
    python bench/report.py docs --check                  say whether they are what the files make of them

A section stands between `<!-- results: DEVICE PART... [of FAMILY] -->` and `<!-- end of results -->`. The
device is `cpu` or `gpu`, the parts are those of `PARTS` and `CHARTS`, the family is a benchmark file's name
without `bench_`.

Importing it needs nothing but Python; charts need matplotlib.
"""

import os
import re
import statistics
import sys
import textwrap
from pathlib import Path

import resources
import results
from rows import by_operation

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
DOCS = ROOT / "docs"
DOCUMENTS = (DOCS / "performance.md",)
SECTION = re.compile(r"(<!-- results: ([a-z_ ]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
DEVICES = {"cpu": "cpu", "gpu": "cuda"}
NO_RUN = "**No {} run.** `bench/results/` has no file of one, so there is no figure."
CHARTS = ("roofline", "speedups")


# -- tables -------------------------------------------------------------------------------------------------


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


def spread(values: list[float]) -> str:
    """The median, and the least and the most where there are several."""
    middle = f"{statistics.median(values):.3g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3g}–{max(values):.3g})"


def summary(rows: list[dict]) -> list[str]:
    """Of each operation the medians over its cases, and the least and the most, as Markdown."""
    lines = ["| operation | cases | % of floor | times the seconds |", "| --- | ---: | ---: | --- |"]
    for name, cases in by_operation(rows).items():
        baselines = dict.fromkeys(other for case in cases for other in case["ratios"])
        ratios = [
            f"{other} {spread([case['ratios'][other] for case in cases if other in case['ratios']])}"
            for other in baselines
        ]
        shares = spread([100 * case["share_of_floor"] for case in cases])
        lines.append(f"| {name} | {len(cases)} | {shares} | {', '.join(ratios)} |")
    return lines


# -- a run ---------------------------------------------------------------------------------------------------


def conditions(run: dict) -> str:
    """Where and with what a run was made, in a sentence."""
    found = run["machine"]
    words = [found.get("gpu") or found.get("processor") or "unknown machine"]
    if not found.get("gpu") and "threads" in found:
        words.append(
            f"{found['threads']} threads, {found.get('instructions', 'no vector instructions known')}"
        )
    names = ("driver", "torch", *("triton",) * bool(found.get("gpu")))
    words += [f"{name} {found[name]}" for name in names if found.get(name)]
    rates = next((run["rates"][device] for device in ("cuda", "cpu") if device in run["rates"]), None)
    if rates:
        words.append(f"copy {rates['copy'] / 1e9:.1f} GB/s read and written")
        words += [f"{name} GEMM {rate / 1e12:.2f} TFLOP/s" for name, rate in rates["gemm"].items()]
    said = f"Commit {found.get('commit', 'unknown')}, {run['begun'][:10]}: {', '.join(words)}."
    return textwrap.fill(said, 120, break_long_words=False, break_on_hyphens=False)


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


def compare(before: dict, after: dict) -> list[str]:
    """The cases of both runs, those that became slower first, and the medians of each operation."""
    old = {(line["device"], line["case"]): line for line in before["cases"]}
    pairs = [(old[key], line) for line in after["cases"] if (key := (line["device"], line["case"])) in old]
    if not pairs:
        return ["The runs have no case in common."]
    gains = {line["case"]: was["seconds"] / line["seconds"] for was, line in pairs}
    lines = ["| case | seconds before | after | times as fast |", "| --- | ---: | ---: | ---: |"]
    for was, line in sorted(pairs, key=lambda pair: gains[pair[1]["case"]]):
        case = line["case"]
        lines.append(f"| {case} | {was['seconds']:.5f} | {line['seconds']:.5f} | {gains[case]:.2f} |")
    lines += ["", "| operation | cases | times as fast |", "| --- | ---: | ---: |"]
    for name, cases in by_operation([line for _, line in pairs]).items():
        lines.append(f"| {name} | {len(cases)} | {spread([gains[line['case']] for line in cases])} |")
    return [*lines, "", conditions(before), conditions(after)]


# -- documentation -------------------------------------------------------------------------------------------


def machine_of(run: dict, device: str) -> str | None:
    return run["machine"].get("gpu" if device == "gpu" else "processor")


def measured(run: dict, device: str, family: str | None = None) -> list[dict]:
    """The cases of a device, or of one benchmark file on it."""
    cases = [line for line in run["cases"] if line["device"] == DEVICES[device]]
    return [line for line in cases if family is None or f"bench_{family}.py" in line["benchmark"]]


def newest(folder: Path, device: str) -> dict[str, tuple[str, dict]]:
    """The newest run with a measured case of each machine, and its file's name, by a short name for files."""
    found: dict[str, tuple[str, dict]] = {}
    for path in sorted(folder.glob("*.json")):
        run = results.load(path)
        if machine_of(run, device) and measured(run, device):
            name = results.name_of(machine_of(run, device), "").removesuffix("-.json")
            if name not in found or found[name][1]["begun"] < run["begun"]:
                found[name] = path.name, run
    return found


PARTS = {
    "conditions": lambda run, rows: [conditions(run)],
    "table": lambda run, rows: table(rows),
    "summary": lambda run, rows: summary(rows),
}


def section(words: str, folder: Path, document: Path) -> list[str]:
    """The lines that a section's mark asks for.

    Raises:
        ValueError: a device, part or family that there is not.
    """
    asked, _, family = words.partition(" of ")
    device, *parts = asked.split()
    for word, known in ((device, DEVICES), *((part, (*PARTS, *CHARTS)) for part in parts)):
        if word not in known:
            raise ValueError(f"{document.name}: expected one of {', '.join(known)}, got {word!r}")
    lines = []
    for name, (_, run) in newest(folder, device).items():
        rows = measured(run, device, family or None)
        if not rows:
            raise ValueError(f"{document.name}: expected a family that was measured, got {family!r}")
        for part in parts:
            chart = os.path.relpath(DOCS / f"{name}-{part}.svg", document.parent)
            made = [f"![{part.capitalize()}]({chart})"] if part in CHARTS else PARTS[part](run, rows)
            lines += ["", *made]
    return [*lines, ""] if lines else [NO_RUN.format(device.upper())]


def written(document: Path, folder: Path = RESULTS) -> str:
    """A document's text with every section made anew.

    Raises:
        ValueError: a mark that says what there is not, or none that ends a section.
    """
    text = document.read_text(encoding="utf-8")
    if not text.count("<!-- results:") == text.count("<!-- end of results -->") == len(SECTION.findall(text)):
        raise ValueError(f"{document.name}: expected every section to begin and end with its mark")

    def anew(found: re.Match) -> str:
        begin, words, end = found.groups()
        return "\n".join([begin[:-1], *section(words, folder, document), end])

    return SECTION.sub(anew, text)


def draw(folder: Path = RESULTS, target: Path = DOCS) -> list[Path]:
    """Draw the charts of every machine; each names the file that it was made of."""
    import charts

    drawn = []
    for device in DEVICES:
        for name, (source, run) in newest(folder, device).items():
            rows, paths = measured(run, device), [target / f"{name}-{chart}.svg" for chart in CHARTS]
            charts.draw_roofline(run, rows, paths[0], source)
            charts.draw_speedups(run, rows, paths[1], source)
            drawn += paths
    return drawn


def stale(folder: Path = RESULTS) -> list[Path]:
    """The documents, and the charts that they show, that are not of the newest results.

    A chart is known by the file that it names: other versions of matplotlib draw other bytes.
    """
    found = [path for path in DOCUMENTS if path.read_text(encoding="utf-8") != written(path, folder)]
    for device in DEVICES:
        for name, (source, _) in newest(folder, device).items():
            charts = [DOCS / f"{name}-{chart}.svg" for chart in CHARTS]
            found += [
                path for path in charts if not path.exists() or source not in path.read_text(encoding="utf-8")
            ]
    return found


def write_documents(check: bool = False) -> int:
    old = stale()
    for path in old:
        print(f"{path.relative_to(ROOT)}: {'not what the results make of it' if check else 'written'}")
    if old and not check:
        for path in DOCUMENTS:
            path.write_text(written(path), encoding="utf-8")
        draw()
    if not old:
        print("the documentation is what the results make of it")
    return int(check and bool(old))


def main(command: str, *words: str) -> int:
    if command == "docs":
        return write_documents(check="--check" in words)
    if command == "resources":
        with results.changed(words[0]) as run:
            run["resources"] = resources.read(Path(words[1]).read_text(encoding="utf-8"))
        return 0
    runs = [results.load(path) for path in words]
    print("\n".join(compare(*runs) if command == "compare" else whole(*runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
