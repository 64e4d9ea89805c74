"""The machine's library from Python, by ctypes: see machine/api.h."""

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import NamedTuple

_SIGNATURES = {
    "error": (c_char_p,),
    "device": (c_int, c_char_p, c_int),
    "device_attribute": (c_int64, c_char_p),
    "option": (c_int, c_char_p, c_double),
    "map": (c_uint64, c_void_p, c_uint64, c_char_p),
    "unmap": (None, c_uint64),
    "undefine": (None, c_void_p, c_uint64),
    "define": (None, c_void_p, c_uint64),
    "define_all": (None,),
    "load": (c_void_p, c_char_p, c_int),
    "parameters": (c_int, c_void_p, c_char_p, POINTER(c_int), c_int),
    "launch": (
        c_int, c_void_p, c_char_p, POINTER(c_uint32), POINTER(c_uint32), c_int64, c_char_p, c_int, c_int64,
    ),
    "statistics": (None, POINTER(c_int64)),
    "kernels": (c_int,),
    "kernel_name": (c_char_p, c_int),
    "listing": (c_char_p, c_int),
    "reset_counts": (None,),
    "patch": (c_int, c_int, c_int, c_char_p, c_int64),
    "restore": (None,),
}  # fmt: skip


class Fault(RuntimeError):
    """What a kernel did that it must not do: which kernel, the line of PTX, the threads."""


class Instruction(NamedTuple):
    line: int
    runs: int  # how often warps ran it
    source: str
    text: str


class Statistics(NamedTuple):
    launches: int
    warp_instructions: int
    lane_instructions: int
    repeated_stores: int  # of a value that another thread had just stored
    conflicts: int


class Machine:
    """The library, loaded; a process has one."""

    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(library, f"ptx_{name}")
            function.restype, function.argtypes = result, arguments
            # What cannot fail and returns nothing is called as it is.
            setattr(self, f"_{name}" if result else name, function)

    def _check(self, failed: bool) -> None:
        if failed:
            raise Fault(self._error().decode())

    def set_device(self, name: str, multiprocessors: int) -> None:
        self._check(self._device(name.encode(), multiprocessors))

    def attribute(self, name: str) -> int:
        return self._device_attribute(name.encode())

    def set_options(self, **values: float) -> None:
        for name, value in values.items():
            self._check(self._option(name.encode(), value))

    def map(self, host: int, size: int, name: str) -> int:
        """Return the device address of memory of the host."""
        address = self._map(host, size, name.encode())
        self._check(not address)
        return address

    def load(self, text: bytes, may_fuse: bool) -> int:
        module = self._load(text, may_fuse)
        self._check(not module)
        return module

    def parameters(self, module: int, kernel: str) -> list[tuple[int, int]]:
        """Return offset and size of each parameter of a kernel."""
        capacity = 256
        numbers = (c_int * capacity)()
        count = self._parameters(module, kernel.encode(), numbers, capacity)
        self._check(count < 0)
        return [(numbers[2 * i], numbers[2 * i + 1]) for i in range(count)]

    def launch(self, module: int, kernel: str, grid, block, shared: int, parameters: bytes) -> None:
        allowed = self.attribute("shared_optin")
        sizes = (c_uint32 * 3)(*grid), (c_uint32 * 3)(*block)
        self._check(self._launch(module, kernel.encode(), *sizes, shared, parameters, False, allowed))

    def counts(self) -> Statistics:
        """Return what was run since the last call."""
        numbers = (c_int64 * len(Statistics._fields))()
        self.statistics(numbers)
        return Statistics(*numbers)

    def kernels(self) -> list[str]:
        """Return the names of all kernels that were loaded; a kernel's number is its place."""
        return [self._kernel_name(i).decode() for i in range(self._kernels())]

    def listing(self, kernel: int) -> list[Instruction]:
        lines = self._listing(kernel).decode().splitlines()
        fields = [line.split("\t", 3) for line in lines]
        return [Instruction(int(line), int(runs), source, text) for line, runs, source, text in fields]

    def patch(self, kernel: int, instruction: int, opcode: str = "", shift: int = 0) -> bool:
        """Put another opcode, or an address that is `shift` bytes further, in an instruction's place."""
        return not self._patch(kernel, instruction, opcode.encode(), shift)
