"""Microseconds of the host in each call, and its waits for the device, on tensors that take no time.

    python bench/host_time.py                      what is installed
    python bench/host_time.py --before FOLDER      beside another checkout, in turns, in one run
    python bench/host_time.py --device cuda        on a GPU, with its kernels

Without a device it runs anywhere, and leaves the kernels of GPUs out: the package is told that CPU tensors
are a GPU's, Triton's launches and the functions of the module `_cuda` do nothing, and what they would have
filled is ones. What is left is the package's Python and torch's operators around the kernels; a launch's own
time (some microseconds) and a real device's allocator are not in it. On a device the time is from the call to
its return, with nothing waited for, and waits are those that torch's own check sees
(`torch.cuda.set_sync_debug_mode`).
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated

import torch
import typer
from torch import Tensor

TENSORS, ENTRIES = 288, 64
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"}
# Of a CPU's LAPACK, not of a GPU's: see python_tests/ops/test_waits.py.
LAPACK = {"aten::cholesky_solve"}


class Nothing(ModuleType):
    """The module `_cuda`, whose functions do nothing; sizes are 0, limits are high, nothing has failed."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        known = {"runtime_error": None, "probe": None, "small_solve_limit": 128}
        return lambda *args: known.get(name, 0)


def as_if_gpu() -> ModuleType:
    """Import engram_kernels with CPU tensors taken for a GPU's, and kernels that do nothing."""
    import triton

    sys.modules["engram_kernels._cuda"] = Nothing("engram_kernels._cuda")
    triton.JITFunction.run = lambda *args, **options: None
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.device = lambda device: nullcontext()
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)
    backends = importlib.import_module("engram_kernels.backends")
    for name in ("triton", "cuda"):
        importlib.import_module(f"engram_kernels.backends.{name}").DEVICES = ("cuda", "cpu")
    for name in backends.NAMES:
        backends.unavailable(name)
    if hasattr(backends, "order"):  # CPU tensors in the order of a GPU's
        order = backends.order
        backends.order = lambda operator, device, *args: order(operator, "cuda", *args)
    else:
        backends._ORDER["cpu"] = backends._ORDER["cuda"]
    # What a kernel leaves unwritten here must pass the checks of results.
    torch.empty, torch.empty_like = torch.zeros, torch.ones_like
    Tensor.new_empty = Tensor.new_ones
    return importlib.import_module("engram_kernels")


def single(ek: ModuleType) -> dict[str, Callable[[], object]]:
    """Calls of one tensor, or of one matrix and its keys."""
    weight, keys, values = torch.randn(8, 8), torch.ones(1, 8), torch.randn(1, 8)
    left, right, inverse = values.T.contiguous(), keys, torch.eye(8, dtype=torch.float64)
    moment = torch.zeros(8, 8)
    pre, ft, logits = torch.randn(3, ENTRIES)
    mask = ek.pack_mask(pre > 0)
    A, B = torch.eye(4, dtype=torch.float64), torch.ones(4, 4, dtype=torch.float64)
    w, z = torch.ones(2, 4), torch.ones(2, 4)
    factors = ek.low_rank_factors

    def unchecked() -> None:
        with ek.checks("off"):
            ek.apply_low_rank_(weight, left, right)

    return {
        "apply_low_rank_": lambda: ek.apply_low_rank_(weight, left, right),
        **({"apply_low_rank_, checks off": unchecked} if hasattr(ek, "checks") else {}),
        **{
            f"low_rank_factors, {mode}": lambda mode=mode: factors(
                weight, keys, values, inverse_covariance=inverse, mode=mode
            )
            for mode in ("independent", "sequential", "joint")
        },
        "low_rank_update": lambda: ek.low_rank_update(weight, keys, values, inverse_covariance=inverse),
        "graft_blend": lambda: ek.graft_blend(pre, ft, logits),
        "graft_blend_packed": lambda: ek.graft_blend_packed(pre, ft, mask),
        "pack_mask": lambda: ek.pack_mask(mask.bool()),
        "unpack_mask": lambda: ek.unpack_mask(mask, (ENTRIES,)),
        "second_moment_": lambda: ek.second_moment_(moment, weight),
        "memory_accumulate_": lambda: ek.memory_accumulate_(A, B, w, z),
        "memory_solve": lambda: ek.memory_solve(A, B, ridge=0.1),
        "memory_stream": lambda: ek.memory_stream(A, B, w.double(), z.double()),
        "pseudo_inverse": lambda: ek.pseudo_inverse(weight, ridge=1.0),
    }


def lists(ek: ModuleType) -> dict[str, Callable[[], object]]:
    """Calls of a list of tensors."""
    fill = lambda: [torch.randn(8, ENTRIES // 8) for _ in range(TENSORS)]  # noqa: E731
    pre, ft, logits, grads, out, others = (fill() for _ in range(6))
    base = [ek.pack_mask(x > 0) for x in pre]
    at = [torch.tensor([3, 9], dtype=torch.int32) for _ in pre]
    values = [torch.ones(2) for _ in pre]
    calls = {
        "_foreach_graft_blend_": lambda: ek._foreach_graft_blend_(out, pre, ft, logits, base),
        "graft_mask_step_": lambda: ek.graft_mask_step_(logits, grads, pre, ft, base, out=out),
        "sparse_apply_": lambda: ek.sparse_apply_(out, at, values),
        "graft_top_k": lambda: ek.graft_top_k(pre, ft, 100),
        "torch._foreach_add_": lambda: torch._foreach_add_(out, grads),
    }
    if hasattr(ek, "GraftPlan"):
        graft = ek.GraftPlan(logits, pre, ft, base, out=out)
        sparse, top = ek.SparsePlan(out, at, values), ek.TopKPlan(pre, 100, ft)
        turns = iter(range(10**9))
        calls |= {
            "GraftPlan.blend_": graft.blend_,
            "GraftPlan.step_, static gradients": lambda: graft.step_(grads),
            "GraftPlan.step_, new gradients": lambda: graft.step_(others if next(turns) % 2 else grads),
            "SparsePlan.swap_": sparse.swap_,
            "TopKPlan.select_": top.select_,
        }
    return calls


def microseconds(call: Callable[[], object], rounds: int, device: str | None) -> float:
    """The median of a call; without a device by the thread's clock, so that other processes do not count."""
    clock = time.perf_counter if device else time.thread_time
    for _ in range(5):
        call()
    seconds = []
    for _ in range(rounds):
        if device == "cuda":
            torch.cuda.synchronize()  # no queue, in which a launch would wait for room
        start = clock()
        call()
        seconds.append(clock() - start)
    return 1e6 * statistics.median(seconds)


def waits(call: Callable[[], object], device: str | None) -> int:
    """How often a call brings a value from the device to the host."""
    if device == "cuda":
        return waits_for_gpu(call)

    def by_lapack(event) -> bool:
        return event.name in LAPACK or (event.cpu_parent is not None and by_lapack(event.cpu_parent))

    lists, tolist = [], Tensor.tolist
    Tensor.tolist = lambda tensor: lists.append(tensor) or tolist(tensor)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as ran:
            call()
    finally:
        Tensor.tolist = tolist
    return len(lists) + sum(e.name in WAITS and not by_lapack(e) for e in ran.events())


def waits_for_gpu(call: Callable[[], object]) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in warned)


def measure(device: str | None) -> None:
    """Print what one checkout takes, as JSON."""
    torch.set_num_threads(1)
    ek = importlib.import_module("engram_kernels") if device else as_if_gpu()
    if hasattr(ek, "checks"):
        ek.checks("async")
    with torch.device(device or "cpu"):
        calls = [(single(ek), 400), (lists(ek), 40)]
    found = {}
    for some, rounds in calls:
        for name, call in some.items():
            found[name] = microseconds(call, rounds, device), waits(call, device)
            if hasattr(ek, "checks"):
                ek.synchronize_checks()
    print(json.dumps(found))


def run(checkout: Path | None, device: str | None) -> dict[str, tuple[float, int]]:
    """What a checkout takes, or what is installed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(checkout)} if checkout else {})
    command = [sys.executable, __file__, "--worker", *(("--device", device) if device else ())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(
    before: Annotated[Path | None, typer.Option(help="Another checkout, with its modules built.")] = None,
    turns: Annotated[int, typer.Option(help="Processes for each checkout.")] = 3,
    device: Annotated[str | None, typer.Option(help="A device that is there, with its kernels.")] = None,
    worker: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measure."""
    if worker:
        measure(device)
        return
    checkouts = {"after": None} | ({"before": before} if before else {})
    taken = {name: [] for name in checkouts}
    for _ in range(turns):
        for name, folder in checkouts.items():
            taken[name].append(run(folder, device))
    print(f"torch {torch.__version__}, medians of {turns} processes; lists of {TENSORS} tensors")
    print("| call | µs before | µs | waits before | waits |\n|---|---:|---:|---:|---:|")
    for call in taken["after"][0]:
        cells = {}
        for name, results in taken.items():
            if call in results[0]:
                middle = statistics.median(result[call][0] for result in results)
                cells[name] = f"{middle:.0f}", str(results[0][call][1])
        old, new = cells.get("before", ("", "")), cells["after"]
        print(f"| `{call}` | {old[0]} | {new[0]} | {old[1]} | {new[1]} |")


if __name__ == "__main__":
    typer.run(main)
