"""What a benchmark ran on: versions, the device and its clocks as found, and the rates of copies and GEMMs.

    python bench/machine.py describe FILE       write versions and devices into a file of results
    python bench/machine.py rates FILE [cpu]    measure the rates, and write them beside the clocks

Nothing here changes a setting of the GPU.
"""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import harness
import results
import torch

import engram_kernels as ek

ROOT = Path(__file__).resolve().parents[1]
CLOCKS = (
    "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit",
    "temperature.gpu", "pstate", "clocks_event_reasons.active",
)  # fmt: skip
DTYPES = {"cuda": (torch.bfloat16, torch.float32, torch.float64), "cpu": (torch.float32, torch.float64)}


def output(*command: str) -> str | None:
    """What a program prints, or None if there is none or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    """The commit in short, and whether files were changed since; ENGRAM_COMMIT where there is no git."""
    if known := os.environ.get("ENGRAM_COMMIT"):
        return known
    found = output("git", "rev-parse", "--short", "HEAD")
    if not found:
        return "unknown"
    return found + ("-modified" if output("git", "status", "--porcelain", "--untracked-files=no") else "")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name as the kernel has it, else its architecture."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe() -> dict:
    """Versions and devices."""
    found = {
        "commit": commit(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backends": ek.backends(),
        **{name: version(name) for name in ("triton", "transformers", "numpy", "pytest-benchmark")},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda,
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "nvcc": (output("nvcc", "--version") or "").rpartition("\n")[2] or None,
        }
    return found


def backends_of(found: dict) -> str:
    """Which backends run, and why the others do not."""
    return ", ".join(
        name if reason is None else f"not {name} ({reason})" for name, reason in found["backends"].items()
    )


def clocks() -> dict:
    """The GPU's clocks, power and temperature now, as nvidia-smi prints them; empty without one."""
    found = {}
    # One at a time: a name that a driver does not know fails the whole query.
    for name in CLOCKS if torch.cuda.is_available() else ():
        found[name] = output("nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader")
    return found


def rates(device: str) -> dict:
    """Bytes a second of a copy, operations a second of a GEMM by dtype, both at their best."""
    return {
        "copy": harness.copy_bandwidth(device),
        "gemm": {str(dtype)[6:]: harness.gemm_rate(device, dtype) for dtype in DTYPES[device]},
    }


def main(command: str, path: str | Path, device: str | None = None) -> None:
    if command == "describe":
        found = describe()
        with results.changed(path) as run:
            run["machine"] |= found
        print(f"{found.get('gpu', 'no GPU')}; backends: {backends_of(found)}")
        return
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    before = clocks()
    measured = rates(device)
    with results.changed(path) as run:
        run["rates"][device] = measured
        run["clocks"] += [before, clocks()] if before else []
    print(f"{device}: copy {measured['copy'] / 1e9:.1f} GB/s read and written; GEMM in TFLOP/s: ", end="")
    print(", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in measured["gemm"].items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
