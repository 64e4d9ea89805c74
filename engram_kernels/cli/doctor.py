"""`engram doctor`: what is here, and what serves what."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from .output import emit, show, table

_CHECKED = {
    "torch": "on CPUs",
    "cpu": "on CPUs, also under ASan and UBSan",
    "triton": "executed as PTX on a CPU; not run on a GPU",
    "cuda": "executed as PTX on a CPU; not run on a GPU",
}
_PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy")


def doctor() -> None:
    """Show versions, devices, backends, and what serves each operator."""
    found = _examined()

    versions = table("package", "version", title="Versions")
    for name, version in found["versions"].items():
        versions.add_row(name, version or "not installed")
    show(versions)

    devices = table("device", "what", title="Devices")
    for one in found["devices"]:
        devices.add_row(one["device"], one["what"])
    if len(found["devices"]) == 1:
        devices.add_row("cuda", "none that torch can see")
    show(devices)

    backends = table("backend", "runs here", "built with", "tested", title="Backends")
    for one in found["backends"]:
        built = ", ".join(
            f"{name} {value if isinstance(value, str) else ' '.join(value)}"
            for name, value in one["built_with"].items()
        )
        backends.add_row(
            one["backend"], "yes" if one["why_not"] is None else f"no: {one['why_not']}", built, one["tested"]
        )
    show(backends)
    if found["forced"]:
        show(f"ENGRAM_BACKEND forces [bold]{found['forced']}[/bold] where it has a kernel.")

    served = table("operator", "device", "served by", "passed over", title="Operators")
    for one in found["operators"]:
        passed = "; ".join(f"{name}: {reason}" for name, reason in one["passed_over"].items())
        served.add_row(one["operator"], one["device"], one["served_by"] or "nothing", passed)
    show(served)
    emit(found)


def _examined() -> dict[str, Any]:
    import torch

    from .. import __version__, backends
    from ..ops.define import OPERATORS

    versions = {"engram_kernels": __version__, "python": platform.python_version()}
    devices = [{"device": "cpu", "what": f"{platform.machine()}, {torch.get_num_threads()} threads"}]
    for i in range(torch.cuda.device_count()):
        it = torch.cuda.get_device_properties(i)
        what = f"{it.name}, sm_{it.major}{it.minor}, {it.total_memory / 2**30:.0f} GiB"
        devices.append({"device": f"cuda:{i}", "what": what})
    operators = []
    for operator in OPERATORS:
        for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
            answers = backends.explain(operator, device)
            first = next((name for name, reason in answers if reason is None), None)
            passed = {name: reason for name, reason in answers if reason is not None}
            operators.append(
                {"operator": operator, "device": device, "served_by": first, "passed_over": passed}
            )
    return {
        "versions": versions | {name: _version(name) for name in _PACKAGES},
        "devices": devices,
        "backends": [
            {
                "backend": name,
                "why_not": backends.unavailable(name),
                "built_with": _build(name),
                "tested": _CHECKED[name],
            }
            for name in backends.NAMES
        ],
        "forced": backends.forced(),
        "operators": operators,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _build(backend: str) -> dict[str, str | tuple[str, ...]]:
    """How a backend's code is compiled, or nothing where it is not."""
    if backend == "triton":
        return _triton_assemblers()
    if backend not in ("cpu", "cuda"):
        return {}
    try:
        module = importlib.import_module(f"..._{backend}", __name__)
    except ImportError:
        return {}
    return module.build_info()


def _triton_assemblers() -> dict[str, str]:
    """The versions of the assemblers that Triton carries: some have compiled other libraries wrongly."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return {}
    versions = {}
    for program in sorted((Path(found.origin).parent / "backends" / "nvidia" / "bin").glob("ptxas*")):
        said = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
        if version := re.search(r"V([\d.]+)", said):
            versions[program.name] = version[1]
    return versions
