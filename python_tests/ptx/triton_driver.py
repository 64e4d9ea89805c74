"""Triton's driver on the PTX machine: Triton compiles, specialises and launches as it does for a GPU.

Its last stage, the assembler, is left out: what is loaded is the PTX.
"""

import struct

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from .library import Machine

# Parameters of a kernel that CUDA allows on every device.
_PARAMETER_BYTES = 4096
_FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q",
    "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp32": "f", "fp64": "d",
}  # fmt: skip
# What the assembler may do is an option of it, and of no line of the PTX.
_UNFUSED = b"\n// ptxas --fmad=false\n"


class _Utilities:
    def __init__(self, machine: Machine):
        self.machine = machine

    def load_binary(self, name, binary, shared, device):
        """Return (module, function, registers, spills, most threads of a block)."""
        module = self.machine.load(binary, may_fuse=not binary.endswith(_UNFUSED))
        return module, (module, name), 0, 0, 1024

    def unload_module(self, module):
        """The machine keeps every module, with what was counted of it."""

    def get_device_properties(self, device):
        return {
            "max_shared_mem": self.machine.attribute("shared_optin"),
            "multiprocessor_count": self.machine.attribute("multiprocessors"),
            "warpSize": 32,
            "max_num_regs": 65536,
        }


def _packed(kind: str, value) -> bytes:
    if kind.startswith("*"):
        return struct.pack("Q", 0 if value is None else value.data_ptr())
    return struct.pack(_FORMATS[kind], value)


class _Launcher:
    def __init__(self, machine: Machine, source, metadata):
        self.machine, self.kinds, self.metadata = machine, list(source.signature.values()), metadata

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
        module, name = function
        values = [
            _packed(kind, value)
            for kind, value in zip(self.kinds, arguments, strict=True)
            if kind != "constexpr"
        ]
        # Triton appends pointers to scratch memory, which no kernel here asks for.
        places = self.machine.parameters(module, name)
        values += [_packed("*i8", None)] * (len(places) - len(values))
        parameters = bytearray(_PARAMETER_BYTES)
        for (offset, size), value in zip(places, values, strict=True):
            assert len(value) == size, f"{name}: a parameter of {size} bytes, an argument of {len(value)}"
            parameters[offset : offset + size] = value
        threads = 32 * self.metadata.num_warps
        self.machine.launch(module, name, (x, y, z), (threads, 1, 1), self.metadata.shared, bytes(parameters))


class _Driver:
    def __init__(self, machine: Machine):
        self.machine, self.utils = machine, _Utilities(machine)

    def launcher_cls(self, source, metadata):
        return _Launcher(self.machine, source, metadata)

    def is_active(self) -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device) -> None:
        pass

    def get_current_stream(self, device) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.machine.attribute("architecture"), 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def install(machine: Machine) -> None:
    """Make the machine what Triton compiles for and launches on in this process."""
    stages = CUDABackend.add_stages

    def add_stages(self, into, options, *rest):
        stages(self, into, options, *rest)
        end = b"" if options.enable_fp_fusion else _UNFUSED
        into["cubin"] = lambda source, metadata: source.encode() + end

    CUDABackend.add_stages = add_stages
    driver.set_active(_Driver(machine))
