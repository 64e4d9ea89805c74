"""Every CUDA source through nvcc for each default GPU: it builds without a warning, and no kernel spills.

And what the module that was built says where it cannot run.
"""

import os
import shutil
import subprocess
import sysconfig

import nvcc
import pytest
import torch

from engram_kernels.backends import cuda

ARCHITECTURES = (80, 90, 100, 120)
_COLUMNS = {"registers": 4, "shared": 6, "stack": 4, "spilled": 4}


@pytest.mark.skipif(nvcc.NVCC is None, reason="no nvcc on PATH or under CUDA_HOME")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", nvcc.SOURCES, ids=lambda source: source.name)
def test_no_kernel_spills(source, architecture, tmp_path):
    if architecture not in nvcc.architectures():
        pytest.skip(f"this nvcc does not know compute_{architecture}")
    print(f"\n{source.name}, sm_{architecture}: registers, bytes of shared memory, of stack, of spills")
    for used in nvcc.resources(source, architecture, tmp_path / "kernels.cubin"):
        numbers = (f"{used[what]:>{wide}}" for what, wide in _COLUMNS.items())
        print(*numbers, f" {used['name']}")
        assert used["stack"] == 0 and used["spilled"] == 0, f"{used['name']} spills on sm_{architecture}"


# The environment's, the newest, and the system's, which may be as old as pyproject.toml allows.
FOUND = [shutil.which("cmake", path=path) for path in os.get_exec_path()]
CMAKES = sorted({os.path.realpath(path) for path in FOUND if path})


@pytest.mark.skipif(nvcc.NVCC is None, reason="no nvcc on PATH or under CUDA_HOME")
@pytest.mark.parametrize("cmake", CMAKES)
@pytest.mark.slow
def test_every_cmake_here_configures_the_cuda_module(cmake, tmp_path):
    ninja = shutil.which("ninja")
    if ninja is None:
        pytest.skip("no ninja")
    options = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_CUDA_COMPILER": nvcc.NVCC,
        "PYTHON_INCLUDE_DIR": sysconfig.get_path("include"),
        "ENGRAM_BUILD_CPU": "OFF",
        "ENGRAM_BUILD_CUDA": "ON",
    }
    command = [cmake, "-G", "Ninja", "-S", str(nvcc.CSRC.parent), "-B", str(tmp_path)]
    command += [f"-D{name}={value}" for name, value in options.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


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
