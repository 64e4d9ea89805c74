"""How everything here is timed: variants interleaved in one run, medians, and a floor beside each.

Two clocks, caches cold for both. `seconds` is from the call to the end of its work, as a caller sees it. On a
GPU `device_seconds` is the GPU's own, by CUDA events, with the launches queued up before the first begins; a
call that waits for the GPU itself (a check for NaN does) has its waits counted.
"""

import ctypes
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

# Larger than the last-level cache of any machine this is run on: data comes cold.
FLUSH_BYTES = 256 << 20
# Not so with --warm (conftest.py).
cold = True
# Passes over them that keep a GPU busy while a call's launches queue up behind.
COVER = 4
# Of a large copy on a GPU, where it must take longer than a launch by far.
COPY_BYTES = 2 << 30
# After this many seconds a case begins no further round.
PATIENCE = 30.0

_CPU_MEMORY = Path("/proc/self/status")
_CPU_PEAK = Path("/proc/self/clear_refs")


@dataclass
class Outcome:
    """One variant's seconds, the memory it took beyond what was there, and the error that let it be timed."""

    seconds: list[float] = field(default_factory=list)
    device_seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    error: float = float("nan")

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def summary(self) -> dict:
        """The figures for a results file."""
        error = self.error if math.isfinite(self.error) else None
        kept = {"seconds": quantiles(self.seconds), "peak_bytes": self.peak_bytes, "error": error}
        return kept | ({"device_seconds": quantiles(self.device_seconds)} if self.device_seconds else {})


def quantiles(values: list[float]) -> dict:
    """Median, the tenth and the ninetieth percentile, and all values."""
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9]).tolist()
    return {"median": middle, "p10": low, "p90": high, "all": values}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timer() -> float:
    """The clock that pytest-benchmark is given: it waits for the GPU where one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@functools.cache
def _flusher(device: str) -> torch.Tensor:
    return torch.zeros(FLUSH_BYTES // 4, device=device)


def flush(device: str) -> None:
    """Put the caches full of something else."""
    _flusher(device).add_(1)


def seconds(function: Callable[[], object], device: str) -> float:
    """Time one call with cold caches, unless `cold` says otherwise, to its end."""
    if cold:
        flush(device)
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def device_seconds(function: Callable[[], object]) -> float:
    """Time one call with cold caches by the GPU's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    for _ in range(COVER):
        flush("cuda")
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _resident(name: str) -> int | None:
    if not _CPU_MEMORY.exists():
        return None
    lines = _CPU_MEMORY.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


@functools.cache
def _give_back() -> Callable[[int], int]:
    """glibc's way to give memory that was freed back to the system; does nothing in other libraries."""
    return getattr(ctypes.CDLL(None), "malloc_trim", lambda keep: 0)


def memory_before(device: str) -> int | None:
    """Begin a new high-water mark; return the bytes in use, or None where nobody counts them."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not _CPU_PEAK.exists():
        return None
    _give_back()(0)  # a call that is served out of what an earlier one freed would seem to take nothing
    try:
        _CPU_PEAK.write_text("5")
    except OSError:
        return None
    return _resident("VmRSS:")


def memory_peak(device: str) -> int | None:
    """Return the high-water mark: the allocator's on a GPU, the process's resident memory on a CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM:")


def peak_bytes(function: Callable[[], object], device: str) -> int | None:
    """Call a function; return what memory it took at most, beyond what was in use."""
    synchronize(device)
    before = memory_before(device)
    function()
    synchronize(device)
    after = memory_peak(device)
    return None if before is None or after is None else max(0, after - before)


def measure(outcome: Outcome, function: Callable[[], object], device: str) -> None:
    """Add the seconds of one call to an outcome."""
    outcome.seconds.append(seconds(function, device))
    if device == "cuda":
        outcome.device_seconds.append(device_seconds(function))


def interleave(
    variants: dict[str, Callable[[], object]], device: str, rounds: int, once: tuple[str, ...] = ()
) -> dict[str, Outcome]:
    """Time the variants in turn, `rounds` times after a warm-up, whose memory is measured.

    Those in `once` are timed a single time, cold, and their memory is not measured. A case that takes long
    has fewer rounds: none begins after `PATIENCE` seconds.
    """
    outcomes = {name: Outcome() for name in variants}
    for name, function in variants.items():
        if name not in once:
            outcomes[name].peak_bytes = peak_bytes(function, device)
    begun = time.perf_counter()
    for i in range(rounds):
        for name, function in variants.items():
            if i == 0 or name not in once:
                measure(outcomes[name], function, device)
        if time.perf_counter() - begun > PATIENCE:
            break
    return outcomes


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes a second of a large copy at its best, read and written both counted."""
    size = COPY_BYTES if device == "cuda" else FLUSH_BYTES
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device, 7)


@functools.cache
def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product at its best."""
    size = 2048 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / _best(lambda: a @ a, device, 5)


def _best(function: Callable[[], object], device: str, rounds: int) -> float:
    clock = device_seconds if device == "cuda" else functools.partial(seconds, device=device)
    function()
    return min(clock(function) for _ in range(rounds))


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
    rounds = 45 if size < 10**6 else 15 if size < 10**7 else 5
    outcomes = interleave(variants, device, rounds, once)
    for name, error in errors.items():
        outcomes[name].error = error
    record(case, "engram", outcomes, traffic, floor(device, traffic, work), work)
    benchmark.pedantic(variants["engram"], rounds=3)
