"""Registers, shared memory and spills of every kernel, by nvcc and by versions of Triton, for eight GPUs.

    python bench/compiled.py measure FILE [FOLDER ...] [--cases REGEX]
    python bench/compiled.py table BEFORE AFTER

The first compiles everything that the file does not hold yet, with the Triton that is installed or with those
in folders (`pip install --no-deps --target FOLDER triton==3.8.0`); the second prints two such files as the
tables of docs/gpu-notes.md. Needs nvcc and no GPU. What Triton has compiled before comes from its cache. Of
each Triton kernel it is the widest case by default: all of them (`--cases .*`) take some hours.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HELPERS = ROOT / "python_tests" / "helpers"
ARCHITECTURES = (80, 90, 100, 120, 89, 103, 86, 87)


# Of each kernel the case with the most registers.
WIDEST = "|".join(
    [
        "update, bf16",
        "update, odd, bf16",
        "residual, bf16",
        "residual, odd, bf16",
        "P, odd",
        "blend, bf16, base",
        "gradient, bf16, base",
        "blend of all, bf16, base",
        "step of all, bf16, base, out",
        "choose, 16 bits",
        "unpack",
        "diff, bf16 with a threshold",
        "select, 16 bits, int64",
        "stream, fp32, K=64, C=768",
        "stream, fp64, K=31, C=999",
        "accumulate, fp64 from fp32, ragged",
        "ridge, V=64",
    ]
)


def keep(file: Path, used: dict) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(used) + "\n")


def load(file: Path) -> list[dict]:
    return (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    )


def cuda(file: Path) -> None:
    """Compile the CUDA sources for each architecture."""
    import nvcc

    done = {(use["case"], use["architecture"]) for use in load(file) if use["compiler"] == "nvcc"}
    with tempfile.TemporaryDirectory() as folder:
        for architecture, source in itertools.product(ARCHITECTURES, nvcc.SOURCES):
            if (source.name, architecture) not in done:
                for used in nvcc.resources(source, architecture, Path(folder) / "kernels.cubin"):
                    used["spilled"] += used.pop("stack")
                    where = {"case": source.name, "compiler": "nvcc", "architecture": architecture}
                    keep(file, {**where, **used})


def of_triton(file: Path, pattern: str) -> None:
    """Compile the Triton kernels for each architecture, with the Triton that this process imports."""
    import triton
    import triton_kernels

    compiler = f"Triton {triton.__version__}"
    done = {(use["case"], use["architecture"]) for use in load(file) if use["compiler"] == compiler}
    for architecture, (name, case) in itertools.product(ARCHITECTURES, triton_kernels.cases().items()):
        if (name, architecture) not in done and re.fullmatch(pattern, name):
            used, _ = triton_kernels.resources(case, architecture)
            kernel = case.kernel.__name__.strip("_")
            where = {"case": name, "compiler": compiler, "architecture": architecture, "name": kernel}
            spilled = used["STACK"] + used["LOCAL"] if used["SPILLS"] else 0
            keep(file, {**where, "registers": used["REG"], "shared": used["SHARED"], "spilled": spilled})


def measure(file: Path, folders: list[str], pattern: str) -> None:
    cuda(file)
    for folder in folders or [""]:
        path = os.pathsep.join(filter(None, [folder, str(ROOT), str(HELPERS), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, __file__, "triton", str(file), "--cases", pattern]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True)


def cell(uses: list[dict]) -> str:
    """Registers / bytes of shared memory / bytes spilled, the most of all cases."""
    if not uses:
        return ""
    return " / ".join(str(max(use[what] for use in uses)) for what in ("registers", "shared", "spilled"))


def table(before: list[dict], after: list[dict], rows, columns) -> list[str]:
    """A row a kernel; where the two differ, the older in front of an arrow."""
    heads = sorted({columns(use) for use in after})
    names = (f"sm_{head}" if isinstance(head, int) else head for head in heads)
    lines = [f"| kernel | {' | '.join(names)} |", "| --- |" + " ---: |" * len(heads)]
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


def plain(name: str) -> str:
    """A kernel by the type of its weight, or its program, alone."""
    return re.sub(r"^program_kernel<(.*)>$", r"\1", re.sub(r"<RowDots<(\w+).*", r"<\1>", name))


def tables(before: list[dict], after: list[dict]) -> list[str]:
    """CUDA kernels by architecture, Triton's by version."""
    parts = [([u for u in found if u["compiler"] == "nvcc"], [u for u in found if u["compiler"] != "nvcc"])
             for found in (before, after)]  # fmt: skip
    return [
        *table(parts[0][0], parts[1][0], lambda use: plain(use["name"]), lambda use: use["architecture"]),
        "",
        *table(parts[0][1], parts[1][1], lambda use: use["name"], lambda use: use["compiler"]),
    ]


def main() -> None:
    sys.path.append(str(HELPERS))
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("command", choices=["measure", "triton", "table"])
    parser.add_argument("file", type=Path)
    parser.add_argument("others", nargs="*", help="folders with Triton; of table the second file")
    parser.add_argument("--cases", default=WIDEST, help="cases of python_tests/helpers/triton_kernels.py")
    args = parser.parse_args()
    if args.command == "table":
        print("\n".join(tables(load(args.file), load(Path(args.others[0])))))
    elif args.command == "triton":
        of_triton(args.file, args.cases)
    else:
        measure(args.file, args.others, args.cases)


if __name__ == "__main__":
    main()
