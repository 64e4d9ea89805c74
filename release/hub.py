"""Lay out the operators as a kernel for the Hugging Face Hub: `python release/hub.py build/hub-kernel`.

    README.md                        its card
    build/torch-cpu, torch-cuda      the reference and Triton's kernels, with metadata.json
    benchmarks/benchmark.py          for `kernels benchmark`

The card, the benchmark and `__init__.py` stand in release/hub/; everything else is copied from the package.
"""

import argparse
import ast
import base64
import hashlib
import inspect
import json
import shutil
from pathlib import Path

import engram_kernels as ek

PACKAGE = Path(ek.__file__).parent
TEMPLATES = Path(__file__).parent / "hub"
# The loader's number of a release: raised when a name or an argument changes or goes.
VERSION = 1


def functions() -> str:
    """Return a table of the public functions with the first line of each docstring."""
    rows = []
    for name in sorted(ek.ops.__all__, key=lambda name: name.strip("_")):
        described = inspect.getdoc(getattr(ek, name)).partition("\n")[0].replace("|", "\\|")
        rows.append(f"| `{name}` | {described} |")
    return "\n".join(["| function | |", "|---|---|", *rows])


def sources() -> list[Path]:
    """Return the operators and backends, and whatever of the package these import."""
    own = PACKAGE / "__init__.py"  # the kernel has another
    found = [path for part in ("ops", "backends") for path in sorted((PACKAGE / part).rglob("*.py"))]
    for path in found:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                tried = [base, *(base / alias.name for alias in node.names)]
                named = [file for stem in tried for file in (stem.with_suffix(".py"), stem / "__init__.py")]
                found += [file for file in named if file.exists() and file not in (*found, own)]
    return found


def variant(folder: Path, backend: str) -> None:
    """Write the folder of a backend: the sources, and what the loader wants to know of them."""
    folder.mkdir(parents=True)
    shutil.copy(TEMPLATES / "init.py", folder / "__init__.py")
    for path in sources():
        target = folder / path.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.py"))}
    digests = {name: hashlib.sha256(content).digest() for name, content in files.items()}
    build = hashlib.sha256(b"".join(digests.values())).hexdigest()[:8]
    metadata = {
        # Under this name it is imported, and its operators are registered: two builds do not meet.
        "id": f"_engram_kernels_{backend}_{build}",
        "name": "engram-kernels",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where to; what is there is replaced")
    folder = parser.parse_args().folder
    shutil.rmtree(folder, ignore_errors=True)
    for backend in ("cpu", "cuda"):
        variant(folder / "build" / f"torch-{backend}", backend)
    card = (TEMPLATES / "card.md").read_text()
    for name, text in (("version", ek.__version__), ("major", str(VERSION)), ("functions", functions())):
        card = card.replace(f"{{{name}}}", text)
    (folder / "README.md").write_text(card)
    (folder / "benchmarks").mkdir()
    shutil.copy(TEMPLATES / "benchmark.py", folder / "benchmarks")


if __name__ == "__main__":
    main()
