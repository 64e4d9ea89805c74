"""The Triton kernels on CPU tensors under Triton's interpreter, in a process of their own."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
# The tests of each family that reach a Triton kernel, and that the interpreter has time for. What
# torch.compile sees of an operator is the same for every backend.
FAMILIES = {
    "low_rank": "not 1000 and not compiles",
    "graft": "not top_k and not sparse and not thousand",
    "memory": "(stream or accumulate) and not gradients",
}


def before(package: str, version: tuple[int, int]) -> bool:
    """Whether a package is there, of an earlier version."""
    if importlib.util.find_spec(package) is None:
        return False
    return tuple(map(int, importlib.metadata.version(package).split(".")[:2])) < version


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are tested compiled")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the child process already")
@pytest.mark.skipif(
    before("triton", (3, 7)) and not before("numpy", (2, 4)),
    reason="the interpreter of Triton before 3.7 does not run under numpy 2.4",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_triton_kernels_interpreted(family):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        f"triton-cpu and {FAMILIES[family]}",
        HERE / f"test_{family}.py",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    print(done.stdout.splitlines()[-1])
