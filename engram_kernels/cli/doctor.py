"""`engram doctor`: what is here, and what serves what."""

import importlib.metadata
import importlib.util
import platform
import re
import subprocess
from pathlib import Path

from rich.table import Table

from .common import console

_CHECKED = {
    "torch": "on CPUs",
    "cpu": "on CPUs, also under ASan and UBSan",
    "triton": "executed as PTX on a CPU; not run on a GPU",
    "cuda": "executed as PTX on a CPU; not run on a GPU",
}


def doctor() -> None:
    """Show versions, devices, backends, and what serves each operator."""
    import torch

    from .. import __version__, backends
    from ..ops.define import OPERATORS

    versions = Table("package", "version", title="Versions")
    versions.add_row("engram_kernels", __version__)
    versions.add_row("python", platform.python_version())
    for name in ("torch", "triton", "transformers", "safetensors", "numpy"):
        versions.add_row(name, _version(name))
    console.print(versions)

    devices = Table("device", "what", title="Devices")
    devices.add_row("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"sm_{properties.major}{properties.minor}"
        devices.add_row(
            f"cuda:{i}", f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"
        )
    if torch.cuda.device_count() == 0:
        devices.add_row("cuda", "none that torch can see")
    console.print(devices)

    table = Table("backend", "runs here", "built with", "tested", title="Backends")
    for name in backends.NAMES:
        reason = backends.unavailable(name)
        table.add_row(name, "yes" if reason is None else f"no: {reason}", _build(name), _CHECKED[name])
    console.print(table)
    if forced := backends.forced():
        console.print(f"ENGRAM_BACKEND forces [bold]{forced}[/bold] where it has a kernel.")

    served = Table("operator", "device", "served by", "passed over", title="Operators")
    for operator in OPERATORS:
        for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
            answers = backends.explain(operator, device)
            first = next((name for name, reason in answers if reason is None), "nothing")
            passed = "; ".join(f"{name}: {reason}" for name, reason in answers if reason is not None)
            served.add_row(operator, device, first, passed)
    console.print(served)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _build(backend: str) -> str:
    """How a backend's code is compiled, or nothing where it is not."""
    if backend == "triton":
        return _triton_assemblers()
    if backend not in ("cpu", "cuda"):
        return ""
    try:
        module = importlib.import_module(f"..._{backend}", __name__)
    except ImportError:
        return ""
    return ", ".join(f"{name} {value}" for name, value in module.build_info().items())


def _triton_assemblers() -> str:
    """The versions of the assemblers that Triton carries: some have compiled other libraries wrongly."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return ""
    programs = sorted((Path(found.origin).parent / "backends" / "nvidia" / "bin").glob("ptxas*"))
    versions = []
    for program in programs:
        said = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
        versions += [f"{program.name} {version}" for version in re.findall(r"V([\d.]+)", said)]
    return ", ".join(versions)
