"""Build what a release publishes into dist/: the sdist and the wheels.

    python release/wheels.py                                   # Python 3.10 to 3.14 on x86-64 and aarch64
    python release/wheels.py --cuda /usr/local/cuda-13.0       # and wheels with CUDA kernels, for x86-64
    python release/wheels.py --python 3.12 --machine x86_64    # one wheel

A wheel of a Python is built with its headers alone, and linked by the compiler of the package ziglang,
against the symbols of glibc 2.28 and its own C++ library. So one machine builds for all, without containers.
The kernels are compiled once for a processor, the bindings once for a Python; the processors side by side.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from headers import headers

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
WORK = ROOT / "build" / "release"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
MACHINES = ("x86_64", "aarch64")
GLIBC = "2.28"


def run(*command: str | Path, **environment: str) -> str:
    """Run a command with the pinned tools; return what it printed, and end with that where it fails."""
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"release: {' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def tool(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts"), name))


def compiler(machine: str) -> Path:
    """Write the compiler for a processor as one program: nvcc and CMake take no arguments with it.

    The kernels themselves go to GCC where there is one for that processor: it makes some of them faster, up
    to a quarter, and they call nothing of a C++ library. Everything else, and the linking, is Zig's.
    """
    program = WORK / f"c++-{machine}"
    lines = ["#!/bin/sh"]
    if gcc := shutil.which(f"{machine}-linux-gnu-g++"):
        lines.append(f'for argument; do case "$argument" in *_kernels.cpp) exec "{gcc}" "$@" ;; esac; done')
    lines.append(f'exec "{tool("python-zig")}" c++ -target {machine}-linux-gnu.{GLIBC} "$@"')
    program.write_text("\n".join(lines) + "\n")
    program.chmod(0o755)
    return program


def sdist() -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", DIST, ROOT)
    (archive,) = DIST.glob("*.tar.gz")
    return archive


def unpack(archive: Path, name: str) -> Path:
    """Unpack into a folder of that name: setuptools builds in the sources, one build at a time."""
    with tarfile.open(archive) as tar:
        tar.extractall(WORK / name, filter="data")
    return WORK / name / archive.name.removesuffix(".tar.gz")


def wheel(source: Path, **environment: str) -> Path:
    raw = source / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", raw, source, **environment)
    (found,) = raw.glob("*.whl")
    return found


def pure(source: Path) -> None:
    """The wheel without native modules: for other systems, and Pythons that are newer than the release."""
    shutil.copy(wheel(source, ENGRAM_CPU="off", ENGRAM_CUDA="off"), DIST)


def native(source: Path, version: str, machine: str, cuda: Path | None = None) -> None:
    """Build the wheel of a Python and a processor, and have auditwheel say for which systems it is."""
    tag = "cp" + version.replace(".", "")
    environment = {
        "ENGRAM_CPU": "on",
        "ENGRAM_CUDA": "on" if cuda else "off",
        "ENGRAM_PYTHON": str(WORK / "headers" / version),
        "CXX": str(compiler(machine)),
        "LDFLAGS": "-s",
        # Also for CMake's first tries: Zig builds its C++ library once for each level.
        "CXXFLAGS": "-O3",
        # What setuptools and sysconfig read where a wheel is for another machine.
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",
        "SETUPTOOLS_EXT_SUFFIX": f".cpython-{tag[2:]}-{machine}-linux-gnu.so",
    }
    if cuda:
        environment |= {"CUDACXX": str(cuda / "bin" / "nvcc"), "CUDAHOSTCXX": shutil.which("g++") or "g++"}
    built = wheel(source, **environment)
    repaired = built.parent / "repaired"
    # auditwheel finds the oldest system for it; the tag is that of torch's wheels, which it needs anyway.
    run(tool("auditwheel"), "repair", "--wheel-dir", repaired, built)
    (found,) = repaired.glob("*.whl")
    platform = f"manylinux_{GLIBC.replace('.', '_')}_{machine}"
    tags = ("--python-tag", tag, "--abi-tag", tag, "--platform-tag", platform)
    name = run(tool("wheel"), "tags", *tags, found).strip()
    shutil.move(repaired / name, DIST)
    print(f"release: {name}", flush=True)


def cuda_version(toolkit: Path) -> str:
    """Return "cu130" of CUDA 13.0."""
    text = run(toolkit / "bin" / "nvcc", "--version")
    return "cu" + text.partition("release ")[2].partition(",")[0].replace(".", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="3.X")
    parser.add_argument("--machine", nargs="+", default=MACHINES, choices=MACHINES)
    parser.add_argument("--cuda", nargs="*", type=Path, default=[], metavar="FOLDER", help="CUDA toolkits")
    chosen = parser.parse_args()
    for folder in (DIST, WORK):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for version in chosen.python:
        headers(version, WORK / "headers" / version)
    archive = sdist()
    pure(unpack(archive, "pure"))

    def build(machine: str) -> None:
        source = unpack(archive, machine)
        for version in chosen.python:
            native(source, version, machine)
        for toolkit in chosen.cuda if machine == "x86_64" else ():
            # A local version: PyPI has the wheels without CUDA, a release's page those with it.
            (source / "setup.cfg").write_text(f"[egg_info]\ntag_build = +{cuda_version(toolkit)}\n")
            for version in chosen.python:
                native(source, version, "x86_64", toolkit)

    with ThreadPoolExecutor() as pool:
        list(pool.map(build, chosen.machine))


if __name__ == "__main__":
    main()
