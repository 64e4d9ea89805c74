"""engram_kernels with its backends `triton` and `cuda` on CPU tensors, which the PTX machine runs.

The package is as it ships: while it looks for a GPU, torch.cuda tells it of one, and then its two backends
are told that they take CPU tensors.
"""

import contextlib
import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from .device_memory import Addresses, device_memory
from .library import Machine


def _cuda_module(path: Path):
    """The extension module `_cuda`, built on the machine's CUDA runtime."""
    spec = importlib.util.spec_from_file_location("engram_kernels._cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _on_device(machine: Machine, function):
    @functools.wraps(function)
    def run(*args, **kwargs):
        with device_memory(machine):
            return function(*args, **kwargs)

    return run


def _tables(machine: Machine, make):
    return lambda *args: _Table(machine, make, args)


class _Table:
    """What a backend makes of the lists of a plan: tensors keep their addresses from call to call."""

    def __init__(self, machine: Machine, make, args):
        self._machine, self._shared = machine, Addresses(machine)
        with device_memory(machine, self._shared):
            self._table = make(*args)

    def __getattr__(self, name):
        found = getattr(self._table, name)
        if not callable(found):
            return found

        def run(*args):
            with device_memory(self._machine, self._shared):
                return found(*args)

        return run

    def __del__(self):
        self._shared.release()


def install(machine: Machine, extension: Path | None) -> None:
    """Import engram_kernels for the machine; without an extension module its Triton kernels alone."""
    if "engram_kernels" in sys.modules:
        raise RuntimeError("engram_kernels has looked for a GPU before the machine was there")
    # A module that is None counts as missing.
    sys.modules["engram_kernels._cuda"] = extension and _cuda_module(extension)
    torch.cuda.device = lambda device: contextlib.nullcontext()
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)
    capability = divmod(machine.attribute("architecture"), 10)
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "get_device_capability", lambda: capability),
    ):
        backends = importlib.import_module("engram_kernels.backends")
        for name in ("triton", "cuda"):
            importlib.import_module(f"engram_kernels.backends.{name}").DEVICES = ("cuda", "cpu")
            for operator, implementations in backends._table.items():
                if name in implementations:
                    found = implementations[name]
                    function = _on_device(machine, found.function)
                    if operator.endswith("_table"):
                        function = _tables(machine, found.function)
                    implementations[name] = found._replace(function=function)
        for name in backends.NAMES:  # asks once, and keeps the answer
            backends.unavailable(name)
            backends.unavailable(name, "cpu")
