"""The CUDA kernels' block programs, stepped thread by thread on the host: see csrc/cuda/block.cuh."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[1] / "native"
CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def compile_and_run(source: Path, program: Path, *options: str) -> subprocess.CompletedProcess:
    """Return the result of the compiler if it fails, else of the program."""
    command = [COMPILER, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *options]
    command += [f"-I{CSRC}", f"-I{CSRC / 'include'}", source, "-o", program]
    compiled = subprocess.run(command, capture_output=True, text=True)
    if compiled.returncode:
        return compiled
    # The tests look for wrong accesses; looking for leaks needs rights that a container may lack.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory) -> tuple[str, ...]:
    """The options for sanitizers, where the compiler and this machine have them."""
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "empty.cpp").write_text("int main() {}\n")
    result = compile_and_run(folder / "empty.cpp", folder / "empty", *SANITIZERS)
    return SANITIZERS if result.returncode == 0 else ()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("source", sorted(NATIVE.glob("cuda_*.cpp")), ids=lambda source: source.stem)
def test_kernels_step_by_step(source, sanitizers, tmp_path):
    result = compile_and_run(source, tmp_path / source.stem, *sanitizers)
    print(result.stdout)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
