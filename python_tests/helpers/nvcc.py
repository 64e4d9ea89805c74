"""nvcc on the package's CUDA sources: what it says that their kernels use."""

import os
import re
import shutil
import subprocess
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))

_TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=_TOOLKIT / "bin")
_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for.*?"
    r"(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:.*?, (?P<shared>\d+) bytes smem)?",
)


def architectures() -> list[int]:
    """Return the architectures that nvcc compiles for, such as 80 for sm_80; none where there is no nvcc."""
    if NVCC is None:
        return []
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout
    return [int(number) for number in re.findall(r"compute_(\d+)\b", known)]


def resources(source: Path, architecture: int, output: Path) -> list[dict]:
    """Compile a source to a cubin; return name, registers, shared, stack and spilled of each kernel.

    Raises:
        RuntimeError: nvcc fails or warns, or its report cannot be read.
    """
    command = [
        *(str(NVCC), "-std=c++17", "-O3", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings"),
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        *(f"-I{CSRC}", f"-I{CSRC / 'include'}", str(source), "-o", str(output)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    report = done.stdout + done.stderr
    # One line for each kernel, so that no match can reach into the next.
    lines = re.sub(r"\s*\n", " ", report).split("ptxas info    : Compiling entry")[1:]
    kernels = [_KERNEL.search("Compiling entry" + line) for line in lines]
    if done.returncode or not kernels or not all(kernels):
        raise RuntimeError(f"{' '.join(command)}\n{report}")
    names = _demangled([kernel["name"] for kernel in kernels])
    return [
        {
            "name": name,
            "registers": int(kernel["registers"]),
            "shared": int(kernel["shared"] or 0),
            "stack": int(kernel["stack"]),
            "spilled": int(kernel["stores"]) + int(kernel["loads"]),
        }
        for name, kernel in zip(names, kernels, strict=True)
    ]


def _demangled(names: list[str]) -> list[str]:
    if not shutil.which("c++filt"):
        return names
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    return [
        re.sub(r"^void |engram::cuda::|\(anonymous namespace\)::|\(.*", "", name)
        for name in text.splitlines()
    ]
