"""Registers, shared memory and spills of every kernel, by nvcc and by versions of Triton, for eight GPUs.

    python bench/compiled.py measure FILE [FOLDER ...]
    python bench/compiled.py table BEFORE AFTER

The first compiles everything, with the Triton that is installed and with those in folders
(`pip install --no-deps --target FOLDER triton==3.8.0`); the second prints two such files as the tables of
docs/gpu-notes.md. Needs nvcc and no GPU. What Triton has compiled before comes from its cache.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HELPERS = ROOT / "python_tests" / "helpers"
ARCHITECTURES = (80, 86, 87, 89, 90, 100, 103, 120)


def cuda() -> list[dict]:
    """Compile the CUDA sources for each architecture."""
    import nvcc

    found = []
    with tempfile.TemporaryDirectory() as folder:
        for source in nvcc.SOURCES:
            for architecture in ARCHITECTURES:
                for used in nvcc.resources(source, architecture, Path(folder) / "kernels.cubin"):
                    used["spilled"] += used.pop("stack")
                    found.append({**used, "compiler": "nvcc", "architecture": architecture})
    return found


def of_triton() -> list[dict]:
    """Compile the Triton kernels, with the Triton that this process imports."""
    import triton
    import triton_kernels

    found = []
    for name, case in triton_kernels.cases().items():
        for architecture in ARCHITECTURES:
            used, _ = triton_kernels.resources(case, architecture)
            found.append(
                {
                    "name": case.kernel.__name__.strip("_"),
                    "case": name,
                    "compiler": f"Triton {triton.__version__}",
                    "architecture": architecture,
                    "registers": used["REG"],
                    "shared": used["SHARED"],
                    "spilled": used["STACK"] + used["LOCAL"],
                }
            )
    return found


def measure(file: Path, folders: list[str]) -> None:
    found = cuda()
    for folder in ["", *folders]:
        path = os.pathsep.join(filter(None, [folder, str(ROOT), str(HELPERS), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, __file__, "triton"],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found += json.loads(done.stdout.splitlines()[-1])
        print(f"{found[-1]['compiler']}: {len(found)} kernels so far", file=sys.stderr, flush=True)
    file.write_text("\n".join(json.dumps(used) for used in found) + "\n", encoding="utf-8")


def cell(uses: list[dict]) -> str:
    """Registers / bytes of shared memory / bytes spilled, the most of all cases."""
    if not uses:
        return ""
    return " / ".join(str(max(use[what] for use in uses)) for what in ("registers", "shared", "spilled"))


def table(before: list[dict], after: list[dict], rows, columns) -> list[str]:
    """A row a kernel; where the two differ, the older in front of an arrow."""
    heads = sorted({columns(use) for use in after}, key=str)
    lines = [f"| kernel | {' | '.join(map(str, heads))} |", "| --- |" + " ---: |" * len(heads)]
    for row in dict.fromkeys(rows(use) for use in after):
        cells = []
        for head in heads:
            old, new = (
                cell([use for use in found if (rows(use), columns(use)) == (row, head)])
                for found in (before, after)
            )
            cells.append(new if old in (new, "") else f"{old} → {new}")
        lines.append(f"| `{row}` | {' | '.join(cells)} |")
    return lines


def tables(before: list[dict], after: list[dict]) -> list[str]:
    """CUDA kernels by architecture, Triton's by version."""
    parts = [([u for u in found if u["compiler"] == "nvcc"], [u for u in found if u["compiler"] != "nvcc"])
             for found in (before, after)]  # fmt: skip
    return [
        *table(parts[0][0], parts[1][0], lambda use: use["name"], lambda use: f"sm_{use['architecture']:03}"),
        "",
        *table(parts[0][1], parts[1][1], lambda use: use["name"], lambda use: use["compiler"]),
    ]


def _load(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def main() -> None:
    sys.path.append(str(HELPERS))
    match sys.argv[1:]:
        case ["triton"]:
            print(json.dumps(of_triton()))
        case ["measure", file, *folders]:
            measure(Path(file), folders)
        case ["table", before, after]:
            print("\n".join(tables(_load(before), _load(after))))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
