"""Builds the machine, and the package's CUDA sources on it, once for each content of their files."""

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "ptx"
CSRC = ROOT / "csrc"
MACHINE = Path(__file__).parent / "machine"

_TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=_TOOLKIT / "bin")
CXX = shutil.which(os.environ.get("CXX") or "g++")
# No -ffast-math and no contraction: a float must be what the instruction says. The other options leave values
# as they are, and let loops over lanes become vectors.
OPTIONS = [
    "-O2", "-ftree-vectorize", "-march=native", "-fPIC", "-fwrapv", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math",
]  # fmt: skip


def missing() -> str | None:
    """Return what cannot be built here, in a sentence, or None."""
    if CXX is None:
        return "no C++ compiler to build the PTX machine with"
    if NVCC is None:
        return "no nvcc on PATH or under CUDA_HOME"
    return None


def machine() -> Path:
    """Return the machine's library, built if need be."""
    sources = sorted(set(MACHINE.glob("*.cpp")) - {MACHINE / "cudart.cpp"})
    headers = sorted(MACHINE.glob("*.h"))
    return _linked("libptx.so", [([CXX, "-std=c++20", *OPTIONS], source, headers) for source in sources], [])


def extension(architecture: int) -> Path | None:
    """Return the module `_cuda`, its kernels as PTX for sm_<architecture>; None where there is no nvcc."""
    if NVCC is None:
        return None
    headers = [path for path in CSRC.rglob("*.*h") if "cpu" not in path.parts]
    include = [CSRC, CSRC / "include", sysconfig.get_paths()["include"]]
    include.append(Path(torch.__file__).parent / "include")  # which has the headers of pybind11
    host = [
        NVCC,
        "-std=c++17",
        "-O3",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        *(f"-I{path}" for path in include),
    ]
    # The PTX alone, as text, with lines of the source.
    target = f"-gencode=arch=compute_{architecture},code=compute_{architecture}"
    device = [*host, target, "-lineinfo", "--compress-mode=none"]
    defines = [
        '-DENGRAM_COMPILER="PTX machine"',
        f'-DENGRAM_CUDA_ARCHS="{architecture}"',
        '-DENGRAM_PTXAS="none"',
    ]
    parts = [(device, source, headers) for source in sorted(CSRC.glob("cuda/*.cu"))]
    parts.append(([*host, *defines], CSRC / "bind_cuda.cpp", headers))
    parts.append(([CXX, "-std=c++20", "-O2", "-fPIC"], MACHINE / "cudart.cpp", [MACHINE / "api.h"]))
    # Symbolic: no CUDA runtime that torch has loaded is asked. The machine's own functions are global ones.
    return _linked(f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}", parts, ["-Wl,-Bsymbolic"])


def _linked(name: str, parts: list[tuple[list, Path, list]], options: list[str]) -> Path:
    """Compile each (command, source, headers) and link the objects, where their contents are new."""
    with _lock(), concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda part: _compiled(*part), parts))
        output = FOLDER / _digest([*objects, *options], []) / name
        if not output.exists():
            _run([CXX, "-shared", *options, *objects], output)
    return output


def _compiled(command: list, source: Path, headers: list) -> Path:
    output = FOLDER / f"{source.stem}-{_digest(command, [source, *headers])}.o"
    if not output.exists():
        _run([*command, "-c", source], output)
    return output


def _digest(command: Iterable, files: Iterable[Path]) -> str:
    digest = hashlib.sha256(
        repr([*map(str, command), sys.version, _version(str(CXX)), _version(str(NVCC))]).encode()
    )
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _version(compiler: str) -> str:
    return (
        subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
        if compiler != "None"
        else ""
    )


def _run(command: list, output: Path) -> None:
    """Run a compiler whose output appears whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f"{output.stem}.{os.getpid()}.unfinished{output.suffix}")
    done = subprocess.run([*command, "-o", unfinished], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, done.args))}\n{done.stderr}")
    unfinished.replace(output)


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    """One process builds at a time; the others then find what it made."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
