"""Every Triton kernel, at every launch configuration, compiled ahead of time for four GPUs without one."""

import re

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton_kernels  # noqa: E402

CASES = triton_kernels.cases()
# Shared memory that one block may have.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


def test_every_kernel_is_compiled():
    assert {case.kernel for case in CASES.values()} == triton_kernels.kernels()


def test_every_launch_says_that_nothing_is_fused():
    """Triton 3.10 turns it off by itself, earlier ones do not: results would differ in the last bit."""
    assert all(case.launch["enable_fp_fusion"] is False for case in CASES.values())


def allowed(name: str, capability: int) -> int:
    # For sm_120 the assembler of Triton 3.8 puts one word of the residual of 16 bits aside, outside its loop.
    one_word = triton.__version__.startswith("3.8.") and capability == 120
    return 3 if one_word and name in ("residual, bf16", "residual, fp16") else 0


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("name", CASES)
def test_compiles_without_spills(name, capability):
    used, ptx = triton_kernels.resources(CASES[name], capability)
    print(f"{name}, sm_{capability}: {used}")
    assert used["SPILLS"] <= allowed(name, capability)
    assert used["SHARED"] <= SHARED_LIMIT[capability]
    # Whatever the sizes, and though a list's pointers come from a table, 16 bytes an access.
    if name in triton_kernels.GRAFT_CASES and CASES[name].divisible and name != "unpack":
        accesses = ("ld",) if name.startswith("diff") else ("ld", "st")  # a mask has few bytes to store
        assert all(re.search(rf"{access}\.global\.(v4\.b32|v2\.b64)", ptx) for access in accesses)
