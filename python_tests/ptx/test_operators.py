"""The operators' tests with the backends `triton` and `cuda`, each kernel as PTX on a CPU, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import build

TESTS = Path(__file__).parents[1]
FAMILIES = ("low_rank", "graft", "memory")
# What torch.compile sees of an operator is the same for every backend, and 1,000 keys are a GEMM's.
SELECTION = "(triton-cpu or cuda-cpu) and not compiles and not 1000"
# As what a kernel runs: a device, and options of the machine (machine/api.h).
RUNS = {
    "A100": "seed=1",
    "H100": "seed=2",
}
# More of them in `make ptx`. What an assembler or a GPU may round otherwise is not within every test's bound
# of bits, but must be within its bound of errors.
MORE = {
    "RTX 4090": "seed=3",
    "RTX 5090": "seed=4",
    "B200": "seed=5 quantum=7 divergence=0.3",
}
if os.environ.get("PTX") == "all":
    RUNS |= MORE


def run(command: list, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are tested there")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", RUNS)
def test_operators(device, family):
    if reason := build.missing():
        pytest.skip(reason)
    coverage = build.FOLDER / "coverage" / f"{device.replace(' ', '-')}-{family}.json"
    coverage.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "ptx.plugin", "-p", "no:cacheprovider"]
    command += ["-k", SELECTION, TESTS / "ops" / f"test_{family}.py"]
    done = run(command, PTX_DEVICE=device, PTX_OPTIONS=RUNS[device], PTX_COVERAGE=str(coverage))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    print(done.stdout.splitlines()[-1])
