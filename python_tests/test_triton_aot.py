"""Every Triton kernel, at every launch configuration, compiled ahead of time for three GPUs without one."""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from engram_kernels.backends.triton import rank_one  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
WEIGHTS = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}


UPDATE = {
    "left": "*fp32", "right": "*fp32", "rows": "i32", "cols": "i32", "rank": "i32",
    "batch_stride": "i64", "row_stride": "i64", "scale": "fp32",
}  # fmt: skip
RESIDUAL = {
    "keys": "*fp32", "values": "*fp32", "residual": "*fp32", "rows": "i32", "cols": "i32", "count": "i32",
    "batch_stride": "i64", "row_stride": "i64",
}  # fmt: skip

# Kernel, arguments after the weight, launch, and what Triton specialises a call for: arguments that are 1 (a
# single key), and sizes divisible by 16 or not.
CASES = {
    "update": (rank_one._apply_low_rank_kernel, UPDATE, rank_one.UPDATE_LAUNCH, (), True),
    "update of rank 1": (rank_one._apply_low_rank_kernel, UPDATE, rank_one.UPDATE_LAUNCH, ("rank",), True),
    "update, odd": (rank_one._apply_low_rank_kernel, UPDATE, rank_one.UPDATE_LAUNCH, (), False),
    "residual": (rank_one._residual_kernel, RESIDUAL, rank_one.residual_launch(16), (), True),
    "residual, 32 keys": (rank_one._residual_kernel, RESIDUAL, rank_one.residual_launch(32), (), True),
    "residual of 1 key": (rank_one._residual_kernel, RESIDUAL, rank_one.residual_launch(1), ("count",), True),
    "residual, odd": (rank_one._residual_kernel, RESIDUAL, rank_one.residual_launch(32), (), False),
}


def test_every_kernel_is_compiled():
    kernels = {value for value in vars(rank_one).values() if isinstance(value, triton.JITFunction)}
    assert {case[0] for case in CASES.values()} == kernels


def resources(case: str, weight: str, capability: int) -> dict[str, int]:
    """Compile a kernel and return what the assembler says it uses: REG, STACK, SHARED, LOCAL, ..."""
    kernel, arguments, launch, ones, divisible = CASES[case]
    arguments, launch = {"weight": weight, **arguments}, dict(launch)
    options = {name: launch.pop(name) for name in ("num_warps", "num_stages")}
    constants = {**launch, "PRECISION": rank_one.PRECISION, **dict.fromkeys(ones, 1)}
    sizes = ("cols", "batch_stride", "row_stride") if divisible else ()
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(arguments.items())
        if kind.startswith("*") or name in sizes
    }
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", report)}
    used["SHARED"] = max(used["SHARED"], compiled.metadata.shared)
    return used


# Shared memory that one block may have: sm_80 163 KiB, sm_90 and sm_100 227 KiB.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(case, weight, capability):
    used = resources(case, WEIGHTS[weight], capability)
    print(f"{case}, {weight}, sm_{capability}: {used}")
    assert used["LOCAL"] == 0 and used["STACK"] == 0
    assert used["SHARED"] <= SHARED_LIMIT[capability]
