"""Every Triton kernel with every launch configuration that calls get, compiled ahead of time for a GPU."""

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engram_kernels.backends.triton import diff, diff_kernels, graft, graft_kernels, low_rank, memory, ridge

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
WEIGHTS = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}


class Case(NamedTuple):
    """A kernel as a call specialises it: types of its arguments, constants, what is divisible by 16."""

    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict
    divisible: set[str]
    launch: dict


def pointers(signature: dict) -> set[str]:
    return {name for name, kind in signature.items() if kind.startswith("*")}


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
# fmt: off
_LOW_RANK = {
    "update": (low_rank._apply_low_rank_kernel, UPDATE, low_rank.update_launch(16, 16, 16), (), True),
    "update of rank 1": (
        low_rank._apply_low_rank_kernel, UPDATE, low_rank.update_launch(16, 16, 16), ("rank",), True,
    ),
    "update, odd": (low_rank._apply_low_rank_kernel, UPDATE, low_rank.update_launch(15, 15, 15), (), False),
    "residual": (low_rank._residual_kernel, RESIDUAL, low_rank.residual_launch(16), (), True),
    "residual, 32 keys": (low_rank._residual_kernel, RESIDUAL, low_rank.residual_launch(32), (), True),
    "residual of 1 key": (low_rank._residual_kernel, RESIDUAL, low_rank.residual_launch(1), ("count",), True),
    "residual, odd": (low_rank._residual_kernel, RESIDUAL, low_rank.residual_launch(32), (), False),
}
# fmt: on


def low_rank_cases():
    """Yield the associative write's cases."""
    for name, (kernel, arguments, launch, ones, sizes_divisible) in _LOW_RANK.items():
        for weight, pointer in WEIGHTS.items():
            signature = {"weight": pointer, **arguments}
            divisible = pointers(signature)
            if sizes_divisible:
                divisible |= {"cols", "batch_stride", "row_stride"}
            constants = {"PRECISION": low_rank.PRECISION, **dict.fromkeys(ones, 1)}
            yield f"{name}, {weight}", Case(kernel, signature, constants, divisible, launch)


PRECONDITION = {
    "keys": "*fp32", "inverse": "*fp32", "out": "*fp64", "count": "i32", "width": "i32",
}  # fmt: skip


GRAFT_WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def graft_cases():
    """Yield name, kernel, signature, constants, and whether pointers are multiples of 16."""
    for weight, pointer in WEIGHTS.items():
        pair = {"pre": pointer, "ft": pointer, "logits": "*fp32"}
        scalars = {"bias": "fp32", "size": "i32"}
        for base in (False, True):
            has_base = {"HAS_BASE": base}
            mask = {"base": "*u8"} if base else {"base": "constexpr"}
            constants = has_base if base else {**has_base, "base": None}
            blend = {"out": pointer, **pair, **mask, **scalars}
            gradient = {"out": "*fp32", "gradient": pointer, **pair, **mask, **scalars}
            case = f"{weight}{', base' if base else ''}"
            for aligned in (True, False) if base and weight == "bf16" else (True,):
                where = "" if aligned else ", misaligned"
                yield f"blend, {case}{where}", graft_kernels.blend_kernel, blend, constants, aligned
                yield f"gradient, {case}{where}", graft_kernels.gradient_kernel, gradient, constants, aligned
            table = {"table": "*i64", "count": "i32", "bias": "fp32"}
            typed = {"WEIGHT": graft.WEIGHTS[GRAFT_WEIGHTS[weight]], **has_base}
            yield f"blend of all, {case}", graft_kernels.blend_all_kernel, table, typed, True
            table = {**table, "lr": "fp32", "l1": "fp32"}
            for out in (False, True):
                name = f"step of all, {case}{', out' if out else ''}"
                yield name, graft_kernels.step_all_kernel, table, {**typed, "HAS_OUT": out}, True
    for bits in (16, 32, 64):
        choice = {**dict.fromkeys(("out", "pre", "ft"), f"*i{bits}"), "mask": "*u8", "size": "i32"}
        yield f"choose, {bits} bits", graft_kernels.choose_kernel, choice, {}, True
    unpack = {"out": "*u8", "packed": "*u8", "size": "i32"}
    yield "unpack", graft_kernels.unpack_kernel, unpack, {}, True
    mark = {"table": "*i64", "count": "i32", "threshold": "fp32", "found": "*i32"}
    select = {"table": "*i64", "count": "i32", "ends": "*i64"}
    for size, bits in diff.BITS.items():
        yield f"diff, {8 * size} bits", diff_kernels.diff_kernel, mark, {"BITS": bits, "FLOAT": None}, True
        for index in diff.INDICES.values():
            name = f"select, {8 * size} bits, {index}"
            yield name, diff_kernels.select_kernel, select, {"BITS": bits, "INDEX": index}, False
    for weight, dtype in GRAFT_WEIGHTS.items():
        constants = {"BITS": diff.BITS[dtype.itemsize], "FLOAT": graft.WEIGHTS[dtype]}
        yield f"diff, {weight} with a threshold", diff_kernels.diff_kernel, mark, constants, True


STREAM = (
    "precision_inverse", "memory", "weights", "latents", "new_precision_inverse", "new_memory", "readouts",
    "leverages",
)  # fmt: skip
STRIDES = ("gram_batch", "gram_row", "gram_column", "cross_batch", "cross_row", "cross_column")


def memory_cases():
    """Yield name, kernel, signature, constants, launch, and whether sizes are multiples of 16."""
    sizes = dict.fromkeys(("slots", "width", "count"), "i32")
    for state, dtype in {"fp32": torch.float32, "fp64": torch.float64}.items():
        pointer, most = f"*{state}", memory.STREAM_SLOTS[dtype]
        signature = {**dict.fromkeys(STREAM, pointer), **sizes}
        shapes = [(block - 1, width) for block in (16, 32, 64) if block <= most for width in (15, 31, 999)]
        for slots, width in (*shapes, (most, 768)):
            launch = memory.stream_launch(slots, width, dtype)
            name = f"stream, {state}, K={slots}, C={width}"
            yield name, memory.stream_kernel, signature, {}, launch, slots % 16 == 0
        for row in ("*fp32", "*bf16", "*fp16", "*fp64"):
            for ragged in (False, True):
                optional = {"alpha": pointer, "ends": "*i64"} if ragged else {"alpha": None, "ends": None}
                signature = {
                    **{"gram": pointer, "cross": pointer, "weights": row, "latents": row},
                    **{name: kind or "constexpr" for name, kind in optional.items()},
                    **sizes,
                    **dict.fromkeys(STRIDES, "i32"),
                }
                constants = {"HAS_ALPHA": ragged, "RAGGED": ragged, "gram_column": 1, "cross_column": 1}
                constants |= {name: None for name, kind in optional.items() if kind is None}
                name = f"accumulate, {state} from {row[1:]}{', ragged' if ragged else ''}"
                launch = memory.ACCUMULATE_LAUNCH
                yield name, memory.accumulate_kernel, signature, constants, launch, not ragged


RIDGE = {
    **dict.fromkeys(("queries", "keys", "memory", "values", "diagonal", "out"), "*fp32"),
    **dict.fromkeys(("count", "width", "latent"), "i32"),
}
# Values, and whether the sizes are multiples of 16.
RIDGE_CASES = {f"ridge, V={values}": (values, values % 16 == 0) for values in (15, 31, 64, 999, 128)}


GRAFT_CASES = {name for name, *_ in graft_cases()}


def cases() -> dict[str, Case]:
    """Return every case by name."""
    found = dict(low_rank_cases())
    for name, divisible in {
        "P": pointers(PRECONDITION) | {"width"},
        "P, odd": pointers(PRECONDITION),
    }.items():
        launch = low_rank.PRECONDITION_LAUNCH
        found[name] = Case(low_rank._precondition_kernel, PRECONDITION, {}, divisible, launch)
    for name, kernel, signature, constants, aligned in graft_cases():
        divisible = pointers(signature) if aligned else set()
        found[name] = Case(kernel, signature, constants, divisible, graft.LAUNCH)
    for name, kernel, signature, constants, launch, sizes_divisible in memory_cases():
        divisible = pointers(signature)
        if sizes_divisible:
            unknown = {"count", *constants}
            divisible |= {n for n, kind in signature.items() if kind == "i32" and n not in unknown}
        found[name] = Case(kernel, signature, constants, divisible, launch)
    for name, (values, sizes_divisible) in RIDGE_CASES.items():
        divisible = pointers(RIDGE) | ({"width", "latent"} if sizes_divisible else set())
        precision, launch = {"PRECISION": ridge.PRECISION}, ridge.chunk_launch(values)
        found[name] = Case(ridge.ridge_chunk_kernel, RIDGE, precision, divisible, launch)
    return found


def kernels() -> set[triton.JITFunction]:
    """Return every kernel of the package: their names end in _kernel; other functions are parts of them."""
    return {
        value
        for family in (low_rank, graft_kernels, diff_kernels, memory, ridge)
        for name, value in vars(family).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }


def _dump(what: str, cubin: str) -> str:
    # It calls the disassembler beside it.
    path = os.pathsep.join([str(CUOBJDUMP.parent), os.environ["PATH"]])
    command = [str(CUOBJDUMP), what, cubin]
    return subprocess.run(
        command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True
    ).stdout


def resources(case: Case, capability: int) -> tuple[dict[str, int], str]:
    """Compile a case; return what the assembler says it uses (REG, STACK, SHARED, ...), and the PTX.

    SPILLS is how many instructions store or load what the registers did not hold. A stack alone is no spill:
    of some kernels assemblers reserve one and do not touch it.
    """
    launch = dict(case.launch)
    options = {
        name: launch.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in launch
    }
    constants = {**launch, **case.constants}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(case.signature) if name in case.divisible
    }
    signature = {**case.signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = _dump("--dump-resource-usage", file.name)
        used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", report)}
        code = _dump("--dump-sass", file.name) if used["STACK"] or used["LOCAL"] else ""
    used["SPILLS"] = len(re.findall(r"\b(?:STL|LDL)\b", code))
    used["SHARED"] = max(used["SHARED"], compiled.metadata.shared)
    return used, compiled.asm["ptx"]
