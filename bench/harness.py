"""How everything here is timed: variants interleaved in one run, medians, and a floor beside each."""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

# Larger than the last-level cache of any machine this is run on: data comes cold.
FLUSH_BYTES = 256 << 20


@dataclass
class Outcome:
    """One variant's seconds, and the error that let it be timed."""

    seconds: list[float] = field(default_factory=list)
    error: float = float("nan")

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@functools.cache
def _flusher(device: str) -> torch.Tensor:
    return torch.zeros(FLUSH_BYTES // 4, device=device)


def flush(device: str) -> None:
    """Put the caches full of something else."""
    _flusher(device).add_(1)


def seconds(function: Callable[[], object], device: str) -> float:
    """Time one call with cold caches, to its end."""
    flush(device)
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def interleave(
    variants: dict[str, Callable[[], object]], device: str, rounds: int, once: tuple[str, ...] = ()
) -> dict[str, Outcome]:
    """Time the variants in turn, `rounds` times after one warm-up; those in `once` a single time, cold."""
    outcomes = {name: Outcome() for name in variants}
    for name, function in variants.items():
        if name not in once:
            function()
    for i in range(rounds):
        for name, function in variants.items():
            if i == 0 or name not in once:
                outcomes[name].seconds.append(seconds(function, device))
    return outcomes


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes a second of a large copy at its best, read and written both counted."""
    source = torch.ones(FLUSH_BYTES // 4, device=device)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(7))
    return 2 * FLUSH_BYTES / best


@functools.cache
def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product at its best."""
    size = 2048 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds(lambda: a @ a, device) for _ in range(5))


def floor(device: str, traffic: float, work: dict[torch.dtype, float]) -> float:
    """The least seconds: bytes at the copy's rate or operations at the GEMM's, whichever is more."""
    arithmetic = sum(count / gemm_rate(device, dtype) for dtype, count in work.items())
    return max(traffic / copy_bandwidth(device), arithmetic)


def relative(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


def check(errors: dict[str, float], slack: float) -> None:
    """A wrong variant ends the benchmark; so does one whose error nobody measured."""
    assert all(error < slack for error in errors.values()), errors


def timed(benchmark, record, case, variants, device, size, traffic, work, errors, once=()):
    """Time the variants, hand ours to pytest-benchmark too, and keep the case for the table."""
    outcomes = interleave(variants, device, rounds=15 if size < 10**7 else 5, once=once)
    for name, error in errors.items():
        outcomes[name].error = error
    record(case, "engram", outcomes, traffic, floor(device, traffic, work))
    benchmark.pedantic(variants["engram"], rounds=3)
