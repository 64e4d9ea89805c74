"""Sparse deltas against what others do with them: find what changed, apply it, trim a change.

    python bench/sparse_deltas.py                     40M bf16 weights, 1 % changed, on two threads
    ENGRAM_MERGEKIT=folder python bench/sparse_deltas.py --model smollm2     with mergekit, and a model

All variants of a case take turns in one run; what is printed is the median of each, and of the ratios within
a round. Before anything is timed, the results are compared bit for bit. The memory that a call takes beyond
its arguments is measured on the CPU (Linux), and must be a small multiple of what changed.
"""

import os
import statistics
import sys
from collections.abc import Callable
from typing import Annotated

import harness
import torch
import typer
from torch import Tensor

import engram_kernels as ek
from engram_kernels.grafting import trim

Case = dict[str, Callable[[], object]]


def changed(tensors: list[Tensor], share: float) -> list[Tensor]:
    """Copies with a share of their entries moved."""
    generator = torch.Generator().manual_seed(0)
    copies = [tensor.clone() for tensor in tensors]
    for copy in copies:
        copy[torch.rand(copy.shape, generator=generator) < share] += 1
    return copies


def nan_staging(weights: list[Tensor], indices: list[Tensor], values: list[Tensor]) -> None:
    """vLLM's way: a whole tensor of NaN, the values in it, copied where it is none."""
    for weight, at, value in zip(weights, indices, values, strict=True):
        staged = torch.full((weight.numel(),), float("nan"), dtype=weight.dtype)
        staged.index_copy_(0, at.long(), value)
        staged = staged.view(weight.shape)
        torch.where(staged.isnan(), weight, staged, out=weight)


def nonzero(old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    return [(a != b).flatten().nonzero().flatten() for a, b in zip(old, new, strict=True)]


def copies(weights: list[Tensor], indices: list[Tensor], values: list[Tensor]) -> None:
    """No check, and nothing to undo it with; the positions are int64 already."""
    for weight, at, value in zip(weights, indices, values, strict=True):
        weight.view(-1).index_copy_(0, at, value)


def kept_copies(weights: list[Tensor], indices: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    """The same, and what was overwritten."""
    before = []
    for weight, at, value in zip(weights, indices, values, strict=True):
        before.append(weight.view(-1)[at])
        weight.view(-1).index_copy_(0, at, value)
    return before


def mergekit_trim(density: float) -> Callable[[Tensor], Tensor]:
    """mergekit's own, from where $ENGRAM_MERGEKIT says; else its algorithm, which sorts."""
    sys.path += os.environ.get("ENGRAM_MERGEKIT", "").split(os.pathsep)
    try:
        from mergekit.sparsify import magnitude

        return lambda change: magnitude(change, density)
    except ImportError:
        print("mergekit is not there: its algorithm is written down here")

    def trimmed(change: Tensor) -> Tensor:
        mask = torch.zeros_like(change)
        kept = torch.argsort(change.abs().view(-1).float(), descending=True)[: int(density * change.numel())]
        mask.view(-1)[kept] = 1
        return change * mask

    return trimmed


def report(title: str, case: Case, ours: str, rounds: int) -> None:
    """Time the variants of a case in turns, and print them beside ours."""
    times: dict[str, list[float]] = {name: [] for name in case}
    for number in range(rounds + 1):
        for name, function in case.items():
            seconds = harness.seconds(function, "cpu")
            if number:  # the first round warms up
                times[name].append(seconds)
    print(f"\n{title}")
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, times[ours], strict=True))
        print(f"  {name:34} {1e3 * statistics.median(seconds):9.2f} ms   {ratio:6.2f} × ours")


def deltas(title: str, old: list[Tensor], share: float, rounds: int) -> None:
    new = changed(old, share)
    found = ek.sparse_diff(old, new)
    wide = [at.long() for at in found.indices]
    assert all(torch.equal(at, truth) for at, truth in zip(wide, nonzero(old, new), strict=True))
    served = [tensor.clone() for tensor in old]
    overwritten = ek.sparse_apply_(served, *found)
    assert all(torch.equal(a, b) for a, b in zip(served, new, strict=True))
    ek.sparse_apply_(served, found.indices, overwritten)
    assert all(torch.equal(a, b) for a, b in zip(served, old, strict=True))
    nan_staging(served, *found)
    assert all(torch.equal(a, b) for a, b in zip(served, new, strict=True))
    entries = sum(map(len, wide))
    print(f"\n{title}: {sum(x.numel() for x in old):,} weights in {len(old)} tensors, {entries:,} changed")

    plan = ek.SparsePlan(served, *found)
    calls: Case = {
        "ek.sparse_diff": lambda: ek.sparse_diff(old, new),
        "(a != b).nonzero()": lambda: nonzero(old, new),
    }
    report("find what changed", calls, "ek.sparse_diff", rounds)
    calls = {
        "ek.sparse_apply_": lambda: ek.sparse_apply_(served, *found),
        "ek.SparsePlan.swap_": plan.swap_,
        "NaN staging": lambda: nan_staging(served, *found),
        "index_copy_ each, int64 ready": lambda: copies(served, wide, found.values),
        "the same, and kept for an undo": lambda: kept_copies(served, wide, found.values),
    }
    report("apply it", calls, "ek.sparse_apply_", rounds)

    size = sum(x.nbytes for x in old)
    for name, function in (
        ("ek.sparse_diff", lambda: ek.sparse_diff(old, new)),
        ("ek.sparse_apply_", lambda: ek.sparse_apply_(served, *found)),
        ("NaN staging", lambda: nan_staging(served, *found)),
    ):
        peak = harness.peak_bytes(function, "cpu")
        if peak is not None:
            print(f"  {name:34} {peak / 2**20:9.1f} MiB beside its arguments of {size / 2**20:.0f} MiB")
            # Indices and values, twice while they are moved to where they stay, and pages that are not full.
            most = 4 * entries * (4 + old[0].element_size()) + (4 << 20)
            assert name == "NaN staging" or peak <= most, f"{name} took {peak}, more than {most}"


def main(
    size: Annotated[int, typer.Option(help="Weights of the one tensor.")] = 40_000_000,
    share: Annotated[float, typer.Option(help="Of them that changed.")] = 0.01,
    model: Annotated[str | None, typer.Option(help="Also a whole model, such as smollm2, in bf16.")] = None,
    trimmed: Annotated[int, typer.Option(help="Weights to trim, fp32.")] = 8_000_000,
    rounds: Annotated[int, typer.Option(help="Of each case.")] = 15,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 2,
) -> None:
    """Measure."""
    torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, {threads} threads, {rounds} rounds")
    generator = torch.Generator().manual_seed(1)
    deltas("one tensor", [torch.randn(size, generator=generator).bfloat16()], share, rounds)
    if model:
        from engram_kernels.editing import load_model

        loaded, _ = load_model(model, dtype=torch.bfloat16)
        deltas(model, [weight.detach() for weight in loaded.parameters()], share, rounds)
    change, theirs = torch.randn(trimmed, generator=generator), mergekit_trim(0.2)
    assert torch.equal(trim(change, 0.2), theirs(change))
    calls: Case = {"grafting.trim": lambda: trim(change, 0.2), "mergekit": lambda: theirs(change)}
    report(f"trim {trimmed:,} changes to a fifth", calls, "grafting.trim", max(3, rounds // 5))


if __name__ == "__main__":
    typer.run(main)
