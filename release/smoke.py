"""Run the C++ kernels of an unpacked wheel with nothing but a Python: `python smoke.py FOLDER`.

No torch: a module takes addresses. So every wheel can be tried, also where torch has none for a Python or a
processor, and under an emulator.
"""

import importlib.machinery
import importlib.util
import re
import sys
import sysconfig
from array import array
from pathlib import Path


def load(folder: Path, name: str):
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    path = folder / "engram_kernels" / f"{name}{suffix}"
    if not path.exists():
        sys.exit(f"smoke: no {path.name} in {folder}: {[found.name for found in path.parent.glob('*.so')]}")
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def address(values: array) -> int:
    return values.buffer_info()[0]


def low_rank(cpu, kind: str, code: int) -> None:
    """W += left @ right, [5, 67] of rank 3, in two threads."""
    rows, columns, rank = 5, 67, 3
    weight = array(kind, [0.5 * i for i in range(rows * columns)])
    left = array(kind, [i - 7.0 for i in range(rows * rank)])
    right = array(kind, [0.25 * i for i in range(rank * columns)])
    expected = [
        weight[i * columns + j] + 2 * sum(left[i * rank + k] * right[k * columns + j] for k in range(rank))
        for i in range(rows)
        for j in range(columns)
    ]
    cpu.apply_low_rank(
        *(address(weight), code, 1, rows, columns, rows * columns, columns),
        *(address(left), address(right), rank, 2.0, True, 2),
    )
    # Every value is a small multiple of a power of two: no rounding.
    assert list(weight) == expected, "apply_low_rank"


def instruction_set(cpu) -> None:
    """The best that the machine has, by the kernel's own list."""
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    needed = {"avx2": {"avx2", "fma", "f16c"}}
    needed["avx512"] = needed["avx2"] | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    compiled = cpu.build_info()["isa_compiled"]
    best = [level for level in compiled if needed.get(level, set()) <= flags][-1]
    assert cpu.build_info()["isa"] == best, f"{cpu.build_info()}, where the processor has {best}"


def sparse_diff(cpu) -> None:
    """The callback into Python, with the interpreter's lock taken in between."""
    old = array("f", range(1000))
    new = array("f", old)
    new[3], new[998] = -1.0, 2.5
    rows = [(0, address(old), address(new), 0, 0, 0, len(old), 0)]
    indices, values = array("i", [0, 0]), array("f", [0.0, 0.0])
    asked = []

    def place(counts):
        asked.append(counts)
        return [(address(indices), address(values))]

    cpu.sparse_diff(rows, 0.0, False, 2, place)
    assert asked == [[2]] and list(indices) == [3, 998] and list(values) == [-1.0, 2.5], "sparse_diff"

    def fail(counts):
        raise LookupError("from Python, through C++, to Python")

    try:
        cpu.sparse_diff(rows, 0.0, False, 2, fail)
    except LookupError as error:
        assert str(error) == "from Python, through C++, to Python"
    else:
        raise AssertionError("an exception of the callback is lost")


def main() -> None:
    folder = Path(sys.argv[1])
    cpu = load(folder, "_cpu")
    instruction_set(cpu)
    low_rank(cpu, "f", 0)
    low_rank(cpu, "d", 3)
    sparse_diff(cpu)
    try:
        cpu.pack_mask("no address")
    except TypeError:
        pass
    else:
        raise AssertionError("a wrong argument is no error")
    said = [f"_cpu ({cpu.build_info()['isa']}, {cpu.build_info()['compiler']})"]
    if list((folder / "engram_kernels").glob("_cuda.*")):
        cuda = load(folder, "_cuda").build_info()
        said.append(f"_cuda (CUDA {cuda['cuda']}, {cuda['archs']})")
    print(f"Python {sys.version.split()[0]} on {sysconfig.get_platform()}: {', '.join(said)}")


if __name__ == "__main__":
    main()
