"""Every CUDA source through nvcc for each default GPU: it builds without a warning, and no kernel spills.

And what the module that was built says where it cannot run.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from engram_kernels.backends import cuda

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a", "100a")

_TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=_TOOLKIT / "bin")
KNOWN = (
    subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout.split() if NVCC else []
)
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for.*?"
    r"(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:.*?, (?P<shared>\d+) bytes smem)?",
)


def demangled(names: list[str]) -> list[str]:
    if not shutil.which("c++filt"):
        return names
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    return [
        re.sub(r"^void |engram::cuda::|\(anonymous namespace\)::|\(.*", "", name)
        for name in text.splitlines()
    ]


@pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH or under CUDA_HOME")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_no_kernel_spills(source, architecture, tmp_path):
    number = re.sub(r"\D", "", architecture)
    if f"compute_{number}" not in KNOWN:
        pytest.skip(f"this nvcc does not know compute_{number}")
    result = subprocess.run(
        [
            *(NVCC, "-std=c++17", "-O3", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings"),
            f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
            *(f"-I{CSRC}", f"-I{CSRC / 'include'}", source, "-o", tmp_path / "kernels.cubin"),
        ],
        capture_output=True,
        text=True,
    )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    # One line for each kernel, so that no match can reach into the next.
    lines = re.sub(r"\s*\n", " ", report).split("ptxas info    : Compiling entry")[1:]
    kernels = [KERNEL.search("Compiling entry" + line) for line in lines]
    assert kernels and all(kernels), f"cannot read the assembler's report:\n{report}"
    print(f"\n{source.name}, sm_{architecture}: registers, bytes of shared memory, of stack, of spills")
    for name, kernel in zip(demangled([kernel["name"] for kernel in kernels]), kernels, strict=True):
        spilled = int(kernel["stores"]) + int(kernel["loads"])
        print(
            f"{kernel['registers']:>4} {kernel['shared'] or 0:>6} {kernel['stack']:>4} {spilled:>4}  {name}"
        )
        assert int(kernel["stack"]) == 0 and spilled == 0, f"{name} spills on sm_{architecture}:\n{report}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_module_says_why_it_cannot_run():
    module = pytest.importorskip("engram_kernels._cuda", exc_type=ImportError)
    error = module.runtime_error()
    assert "CUDA" in error
    assert module.runtime_error() == error


class Module:
    """Stands for the extension module on a machine with a GPU."""

    def __init__(self, error: str | None):
        self.runtime_error = lambda: error

    def build_info(self) -> dict[str, str]:
        return {"cuda": "13.0"}


@pytest.mark.parametrize("error", [None, "CUDA driver version is insufficient for CUDA runtime version"])
def test_a_runtime_that_cannot_use_the_gpu_is_a_reason(monkeypatch, error):
    monkeypatch.setattr(cuda, "_missing", None)
    monkeypatch.setattr(cuda, "_module", Module(error))
    monkeypatch.setattr(cuda, "no_nvidia_gpu", lambda: None)
    expected = error and f"the CUDA 13.0 of the module _cuda cannot run here: {error}"
    assert cuda.unavailable() == expected
