"""Calls every kernel of a backend at small sizes, to be run under compute-sanitizer.

    compute-sanitizer --tool memcheck python bench/sanitize.py cuda
    python bench/sanitize.py torch --device cpu        what it calls, without a GPU

The calls are those of the tests' `operator_calls`, and others whose sizes are odd and take several blocks.
"""

import argparse
import sys
from pathlib import Path

import torch

import engram_kernels as ek
from engram_kernels.backends import explain
from engram_kernels.ops.define import OPERATORS, ops

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_tests" / "helpers"))
from operator_calls import operator_calls


def larger_calls() -> list[tuple[str, tuple]]:
    """Several blocks and none of them full, in more than one type."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        weight, keys, values = (
            torch.randn(2, 70, 301).to(dtype),
            torch.randn(2, 9, 301),
            torch.randn(2, 9, 70),
        )
        found.append(("apply_low_rank_", (weight.clone(), values.mT.contiguous(), keys, 0.5)))
        found.append(("residual_gram", (weight, keys, values, keys.double())))
        pre, ft, gradient = torch.randn(3, 20003).to(dtype)
        logits, packed = torch.randn(20003), ek.pack_mask(torch.rand(20003) < 0.5)
        lists = [logits], [gradient], [pre], [ft], [packed]
        found.append(("graft_blend", (pre, ft, logits, packed, 0.5)))
        found.append(("graft_logits_gradient", (gradient, pre, ft, logits, packed, 0.5)))
        found.append(("graft_mask_step_", (*lists, 0.5, 0.1, 0.0, [torch.zeros_like(pre)])))
        found.append(("top_k_mask", ([pre, pre[:5], pre[:0]], [ft, ft[:5], ft[:0]], 777)))
    found.append(("precondition", (torch.randn(2, 21, 301), torch.randn(2, 301, 301))))
    system = torch.eye(70, dtype=torch.float64).repeat(3, 1, 1)
    found.append(("small_solve", (system, torch.randn(3, 70, 33), "cholesky")))
    found.append(("pack_mask", (torch.rand(20003) < 0.5,)))
    at = torch.randperm(20003)[:1777].int()
    weights, values = torch.randn(20003), torch.randn(1777)
    found.append(("sparse_faults", ([weights], [at])))
    found.append(("sparse_apply_", ([weights], [at], [values], [torch.zeros(1777)], False)))
    for dtype in (torch.float32, torch.float64):
        state = torch.eye(37, dtype=dtype).repeat(3, 1, 1), torch.zeros(3, 37, 75, dtype=dtype)
        found.append(
            (
                "memory_stream",
                (*state, torch.randn(3, 35, 37, dtype=dtype), torch.randn(3, 35, 75, dtype=dtype)),
            )
        )
    q, k, v = torch.randn(2, 41, 3, 37), torch.randn(2, 41, 3, 37), torch.randn(2, 41, 3, 75)
    state = [torch.zeros(2, 3, *shape, dtype=torch.float64) for shape in ((37, 37), (37, 75), ())]
    arguments = q, k, v, torch.rand(2, 41, 3), None, torch.ones(3, 37), *state, None, False
    found.append(("ridge_memory", arguments))
    return found


def moved(argument, device: str):
    if isinstance(argument, torch.Tensor):
        return argument.to(device)
    return [moved(part, device) for part in argument] if isinstance(argument, list) else argument


def run(backend: str, device: str) -> list[str]:
    """Call what the backend has a kernel for; return the names."""
    called = []
    calls = [*operator_calls().items(), *larger_calls()]  # made without the backend, on the CPU
    with ek.use_backend(backend):
        for name, arguments in calls:
            given = tuple(moved(argument, device) for argument in arguments)
            if explain(name, device, given)[0] == (backend, None):
                getattr(ops, name)(*given)
                called.append(name)
                if device == "cuda":
                    torch.cuda.synchronize()  # so that a report names the call
    return called


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=("torch", "cpu", "triton", "cuda"))
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    torch.manual_seed(0)
    called = run(given.backend, given.device)
    assert called, f"{given.backend} has no kernel that takes any of the calls"
    missing = [name for name in OPERATORS if name not in called]
    print(
        f"{len(called)} calls of {len(set(called))} operators; no kernel for {', '.join(missing) or 'none'}"
    )


if __name__ == "__main__":
    main()
