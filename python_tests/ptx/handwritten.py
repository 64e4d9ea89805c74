"""Kernels written by hand as PTX, and arrays of numpy as their memory."""

import ctypes
from ctypes import c_uint32

import numpy as np

from . import build
from .library import Machine

# How the architecture and the bounds of a kernel are written; its parameters are addresses.
MODULE = """.version 8.8
.target sm_{architecture}
.address_size 64
.file 1 "/somewhere/kernel.cu"
.extern .shared .align 16 .b8 dynamic[];
.visible .entry kernel({parameters}) {bounds}
{{
.reg .pred %p<8>;
.reg .b16 %h<16>;
.reg .b32 %r<40>;
.reg .b64 %rd<24>;
.reg .f64 %d<32>;
.shared .align 16 .b8 buffer[1024];
{loads}
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
{body}
ret;
}}
"""


class Handwritten:
    """The machine, with kernels of a body whose parameters are %rd0, %rd1, ..., thread %r0 and block %r1."""

    def __init__(self):
        self.machine = Machine(build.machine())
        self.defaults()

    def defaults(self) -> None:
        self.machine.set_device("A100", 4)
        self.machine.set_options(
            seed=1, quantum=64, divergence=0.05, resident=3, races=1, definedness=1, conflicts=1,
            fusion=0, approximation=0, sums=0, limit=2e10,
        )  # fmt: skip

    @staticmethod
    def text(body: str, parameters: int = 0, bounds: str = "", architecture: str = "80") -> str:
        return MODULE.format(
            architecture=architecture,
            bounds=bounds,
            body=body,
            parameters=", ".join(f".param .u64 p{i}" for i in range(parameters)),
            loads="\n".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(parameters)),
        )

    def load(self, body: str, parameters: int = 0, may_fuse: bool = False, **text) -> int:
        return self.machine.load(self.text(body, parameters, **text).encode(), may_fuse)

    def launch(
        self, module: int, *arrays, grid=1, threads=32, shared=0, cooperative=False, allowed=48 << 10
    ) -> None:
        """Run a loaded kernel on arrays, or on device addresses."""
        owned = [self.map(array) if isinstance(array, np.ndarray) else array for array in arrays]
        parameters = b"".join(address.to_bytes(8, "little") for address in owned)
        try:
            sizes = (c_uint32 * 3)(grid, 1, 1), (c_uint32 * 3)(threads, 1, 1)
            failed = self.machine._launch(module, b"kernel", *sizes, shared, parameters, cooperative, allowed)
            self.machine._check(failed)
        finally:
            for address, array in zip(owned, arrays, strict=True):
                if isinstance(array, np.ndarray):
                    self.machine.unmap(address)

    def map(self, array: np.ndarray, name: str = "array") -> int:
        return self.machine.map(array.ctypes.data, array.nbytes, name)

    def run(self, body: str, *arrays, may_fuse: bool = False, bounds="", architecture="80", **launch) -> None:
        module = self.load(body, len(arrays), may_fuse, bounds=bounds, architecture=architecture)
        self.launch(module, *arrays, **launch)

    def lanes(self, instruction: str, result, *inputs: np.ndarray, **options) -> np.ndarray:
        """Run an instruction of {d}, {a}, {b}, {c}, an entry a lane; a `result` of bool is a predicate."""
        count = len(inputs[0])
        body, names = [], {}
        for number, (name, array) in enumerate(
            [("d", np.empty(count, result)), *zip("abc", inputs, strict=False)]
        ):
            size = array.itemsize
            address = f"%rd{8 + number}"
            body.append(f"mad.wide.u32 {address}, %r0, {size}, %rd{number};")
            register = f"{'%h' if size <= 2 else '%r' if size == 4 else '%rd'}{4 + number + 12 * (size == 8)}"
            names[name] = f"%p{number}" if array.dtype == bool else register
            if name == "d":
                output = register, address, size
            else:
                body.append(f"ld.global.{'u8' if size == 1 else f'b{8 * size}'} {register}, [{address}];")
                if array.dtype == bool:
                    body.append(f"setp.ne.u16 %p{number}, {register}, 0;")
        body.append(instruction.format(**names) + ";")
        register, address, size = output
        if np.dtype(result) == bool:
            body.append(f"selp.u16 {register}, 1, 0, {names['d']};")
        body.append(f"st.global.b{8 * size} [{address}], {register};")
        output = np.zeros(count, result)
        arrays = [output, *map(np.ascontiguousarray, inputs)]
        self.run("\n".join(body), *arrays, threads=count, **options)
        return output


def first_undefined(array: np.ndarray) -> int:
    """Return the offset of the first byte that nobody has written, or -1."""
    function = ctypes.CDLL(str(build.machine())).ptx_first_undefined
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_uint64], ctypes.c_int64
    return function(*host_bytes(array))


def host_bytes(array: np.ndarray) -> tuple[int, int]:
    return array.ctypes.data_as(ctypes.c_void_p).value, array.nbytes


def zeros(count: int = 32) -> np.ndarray:
    return np.zeros(count, np.uint32)


# The address of word %r0 of the first array is %rd20, and of the shared buffer %r20.
WORD = """
mad.wide.u32 %rd20, %r0, 4, %rd0;
mov.u32 %r20, buffer;
mad.lo.s32 %r20, %r0, 4, %r20;
"""
