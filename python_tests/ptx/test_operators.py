"""The operators' tests with the backends `triton` and `cuda`: the PTX of every kernel, run on a CPU."""

import os

import pytest

from . import build, child

FAMILIES = ("low_rank", "graft", "diff", "memory", "ridge", "plans")
# What torch.compile sees of an operator is the same for every backend, and 1,000 keys are a GEMM's.
SELECTION = "(triton-cpu or cuda-cpu) and not compiles and not 1000"
# A device with a few of its multiprocessors, and the machine's options (machine/api.h).
RUNS = {"A100": ("A100:4", "seed=1"), "H100": ("H100:40", "seed=2")}
if os.environ.get("PTX") == "all":
    RUNS |= {
        "RTX 4090": ("RTX 4090:4", "seed=3 quantum=7 divergence=0.3"),
        "RTX 5090": ("RTX 5090:40", "seed=4 quantum=1000 resident=16"),
        "B200": ("B200:4", "seed=5"),
        # What assemblers and GPUs may round otherwise.
        "other roundings": ("A100:4", "seed=6 sums=1 approximation=1 fusion=0.5"),
    }
REASON = child.missing()


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("run", RUNS)
def test_operators(run, family):
    device, options = RUNS[run]
    coverage = build.FOLDER / "coverage" / f"{run.replace(' ', '-')}-{family}.json"
    coverage.parent.mkdir(parents=True, exist_ok=True)
    printed = child.run(
        *("-m", "pytest", "-q", "-p", "ptx.plugin", "-p", "no:cacheprovider", "-k", SELECTION),
        child.TESTS / "ops" / f"test_{family}.py",
        PTX_DEVICE=device,
        PTX_OPTIONS=options,
        PTX_COVERAGE=str(coverage),
    )
    assert " passed" in printed
    print(printed.splitlines()[-1])
