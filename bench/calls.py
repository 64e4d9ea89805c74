"""Of each operator its waits for the GPU and the host's microseconds a call, on small tensors; worst first.

    python bench/calls.py [cuda|cpu]

The host's time is from the call to its return, with nothing waited for. Waits are those that torch's own
check sees (`torch.cuda.set_sync_debug_mode`); on a CPU there are none to see.
"""

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "python_tests" / "helpers"))
from operator_calls import operator_calls

import engram_kernels as ek
from engram_kernels.ops.define import ops

ROUNDS = 50


def on(device: str, value: object) -> object:
    """Bring every tensor of an argument to a device."""
    if isinstance(value, (list, tuple)):
        return type(value)(on(device, part) for part in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def microseconds(call: Callable[[], object], device: str) -> float:
    seconds = []
    for _ in range(ROUNDS):
        if device == "cuda":
            torch.cuda.synchronize()  # no queue, in which a launch would wait for room
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds)


def waits(call: Callable[[], object], device: str) -> int:
    if device != "cuda":
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in warned)


def main(device: str = "cuda") -> None:
    torch.manual_seed(0)
    ek.checks("async")
    found = {}
    for name, arguments in operator_calls().items():
        moved, operator = on(device, arguments), getattr(ops, name)

        def call(operator=operator, moved=moved) -> object:
            return operator(*moved)

        call()  # compiles, and lets libraries allocate
        found[name] = microseconds(call, device), waits(call, device)
    print(f"{'operator':28} µs of the host   waits")
    for name, (taken, count) in sorted(found.items(), key=lambda item: item[1][::-1], reverse=True):
        print(f"{name:28} {taken:14.1f} {count:7}")


if __name__ == "__main__":
    main(*sys.argv[1:])
