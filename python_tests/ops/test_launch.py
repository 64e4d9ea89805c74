"""Launch configurations: pure functions of shape, that cover it exactly and fit three GPUs; and one trap."""

import ast
import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import cases
import pytest
import torch

import engram_kernels as ek

ROOT = Path(__file__).parents[2]

# Multiprocessors, and bytes of shared memory that a block may have: A100, H100 and H200, B200.
GPUS = {"sm_80": (108, 163 << 10), "sm_90": (132, 227 << 10), "sm_100": (148, 227 << 10)}
MOST_BLOCKS = 2**31 - 1
SHAPES = [(1, 1, 1), (1, 33, 65), (3, 32, 128), *((1, *m.output_projection) for m in cases.MODELS)]
COUNTS = [1, 2, 16, 17, 100, 1024]


def divided(size: int, block: int) -> int:
    return -(-size // block)


# -- Triton --------------------------------------------------------------------------------------------------


class Recorder:
    """Stands for a kernel: keeps its grid and its launch instead of running."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **launch: self.launches.append((grid, launch))


@pytest.fixture
def recorded(monkeypatch):
    """Return a function that records what a backend's function launches on tensors without data."""
    pytest.importorskip("triton", reason="triton is not installed")

    def asked(*args, **options):
        raise AssertionError("a launch configuration asks the device")

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    for name in ("get_device_properties", "get_device_capability", "current_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, asked)

    def record(module, kernel, function, *args):
        recorder = Recorder()
        monkeypatch.setattr(module, kernel, recorder)
        function(*args)
        function(*args)
        first, second = recorder.launches
        assert first == second
        (programs,), launch = first
        assert 0 < programs <= MOST_BLOCKS
        assert launch["num_warps"] in (1, 2, 4, 8, 16, 32)
        assert launch["enable_fp_fusion"] is False
        for name, size in launch.items():
            if name.startswith(("BLOCK", "ROWS")):
                assert size & (size - 1) == 0, f"{name} = {size} is no power of two"
        return programs, launch

    return record


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_triton_low_rank(recorded, shape, count):
    from engram_kernels.backends.triton import low_rank

    batch, rows, cols = shape
    weight = meta(batch, rows, cols, dtype=torch.bfloat16)
    programs, launch = recorded(
        low_rank, "_apply_low_rank_kernel", low_rank.apply_low_rank_,
        weight, meta(batch, rows, count), meta(batch, count, cols), 1.0,
    )  # fmt: skip
    tiles = divided(rows, launch["BLOCK_ROWS"]) * divided(cols, launch["BLOCK_COLS"])
    assert programs == batch * tiles
    stage = 4 * launch["BLOCK_RANK"] * (launch["BLOCK_ROWS"] + launch["BLOCK_COLS"])
    assert launch["num_stages"] * stage <= min(shared for _, shared in GPUS.values())

    programs, launch = recorded(
        low_rank, "_residual_kernel", low_rank.residual_gram,
        weight, meta(batch, count, cols), meta(batch, count, rows), meta(batch, count, cols).double(),
    )  # fmt: skip
    assert programs == batch * divided(rows, launch["BLOCK_ROWS"]) * divided(count, launch["BLOCK_KEYS"])
    stage = 4 * launch["BLOCK_COLS"] * (launch["BLOCK_ROWS"] + launch["BLOCK_KEYS"])
    assert launch["num_stages"] * stage <= min(shared for _, shared in GPUS.values())

    if 0 < count <= low_rank.PRECONDITION_KEYS and cols < 2**15:
        programs, launch = recorded(
            low_rank, "_precondition_kernel", low_rank.precondition,
            meta(batch, count, cols), meta(batch, cols, cols),
        )  # fmt: skip
        assert programs == batch * divided(cols, launch["BLOCK_COLS"]) * divided(count, launch["BLOCK_KEYS"])
    # tl.dot takes no side below 16.
    assert min(size for name, size in launch.items() if name.startswith("BLOCK")) >= 16


@pytest.mark.parametrize("size", [1, 7, 2048, 2049, 58_720_256, 2**31 + 1])
def test_triton_graft(recorded, size):
    from engram_kernels.backends.triton import graft

    pre, logits = meta(size, dtype=torch.bfloat16), meta(size)
    programs, launch = recorded(graft, "blend_kernel", graft.graft_blend, pre, pre, logits, None, 0.5)
    entries = 8 * launch["ROWS"]
    assert (programs - 1) * entries < size <= programs * entries
    for count in (1, 3):
        weights = [pre] * count
        programs, _ = recorded(
            graft, "blend_all_kernel", graft._foreach_graft_blend_,
            weights, weights, weights, [logits] * count, [], 0.5,
        )  # fmt: skip
        assert programs == count * divided(size, entries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 64, 65, 768, 4096])
@pytest.mark.parametrize("slots", [1, 15, 16, 17, 32, 33, 64])
def test_triton_stream(recorded, slots, width, dtype):
    from engram_kernels.backends.triton import memory

    if slots > memory.STREAM_SLOTS[dtype]:
        pytest.skip(f"{slots} slots are not for this kernel")
    inputs = [
        meta(5, *shape, dtype=dtype) for shape in ((slots, slots), (slots, width), (9, slots), (9, width))
    ]
    programs, launch = recorded(memory, "stream_kernel", memory.memory_stream, *inputs)
    assert launch == memory.stream_launch(slots, width, dtype)
    block, columns = launch["BLOCK_SLOTS"], launch["BLOCK_WIDTH"]
    assert programs == 5 * divided(width, columns)
    assert slots <= block < max(17, 2 * slots)
    # P and a block of M stay in registers: at most 16 of each thread's for either.
    assert block * max(block, columns) * dtype.itemsize // 4 <= 16 * 32 * launch["num_warps"]


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 33, 65), (64, 512, 768), (1, 4096, 4096)], ids=str)
def test_triton_accumulate(recorded, shape):
    from engram_kernels.backends.triton import memory

    batch, slots, width = shape
    programs, launch = recorded(
        memory, "accumulate_kernel", memory.memory_accumulate_,
        meta(batch, slots, slots), meta(batch, slots, width), meta(batch, 2, slots), meta(batch, 2, width),
        None, None,
    )  # fmt: skip
    columns = divided(slots, launch["BLOCK_COLS"]) + divided(width, launch["BLOCK_COLS"])
    assert programs == batch * divided(slots, launch["BLOCK_ROWS"]) * columns


# -- CUDA C++ ------------------------------------------------------------------------------------------------

_TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=_TOOLKIT / "bin")


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """Return a function from lines such as "solve 1 16 4" to the numbers of each configuration."""
    if NVCC is None:
        pytest.skip("no nvcc on PATH or under CUDA_HOME")
    program = tmp_path_factory.mktemp("launch") / "launch"
    source = Path(__file__).parents[1] / "native" / "launch.cu"
    options = ["-std=c++17", "-arch=compute_80", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
    subprocess.run([NVCC, *options, source, "-o", program], check=True)

    def ask(lines: list[str]) -> list[list[int]]:
        done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
        answers = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
        assert len(answers) == len(lines)
        return answers

    return ask


def test_cuda_low_rank(printed):
    asked = [(*shape, count) for shape in SHAPES for count in COUNTS]
    words = [" ".join(map(str, shape)) for shape in asked]
    for kind in ("update-bf16", "update-fp32"):
        for (batch, rows, cols, _), answer in zip(
            asked, printed([f"{kind} {w}" for w in words]), strict=True
        ):
            blocks, tile_rows, tile_cols, shared = answer
            assert blocks == batch * divided(rows, tile_rows) * divided(cols, tile_cols) <= MOST_BLOCKS
            assert shared <= 48 << 10  # what a launch has without asking
    answers = printed([f"residual {w}" for w in words])
    for (batch, rows, _, count), (blocks, tile_rows, tile_keys, slices, shared) in zip(
        asked, answers, strict=True
    ):
        assert blocks == batch * divided(rows, tile_rows) * divided(count, tile_keys) <= MOST_BLOCKS
        assert slices * tile_rows == 32 * 2 and slices in (1, 2, 4, 8)
        assert shared <= 48 << 10
        # Where rows are few, warps share them until every multiprocessor has a block, or all eight do.
        assert slices == 8 or blocks >= max(multiprocessors for multiprocessors, _ in GPUS.values())


def test_cuda_small_solve(printed):
    orders = [1, 2, 16, 100, 128]
    answers = printed([f"solve 3 {order} {columns}" for order in orders for columns in (0, 1, 70, 4096)])
    for i, (blocks, tile, shared) in enumerate(answers):
        columns = (0, 1, 70, 4096)[i % 4]
        assert blocks == 3 * max(1, divided(columns, tile))
        # The smallest GPUs of compute capability 8 allow a block 99 KiB.
        assert shared <= 99 << 10


@pytest.mark.parametrize("gpu", GPUS)
def test_cuda_stream(printed, gpu):
    multiprocessors, limit = GPUS[gpu]
    shapes = [
        (batch, slots, width, element)
        for batch in (1, 7, 64, 1000)
        for slots, width in ((1, 1), (32, 64), (512, 768), (1000, 333), (4096, 4096))
        for element in (4, 8)
    ]
    lines = [f"stream {' '.join(map(str, shape))} {multiprocessors} {limit}" for shape in shapes]
    for (batch, slots, width, element), answer in zip(shapes, printed(lines), strict=True):
        members, groups, columns, resident, shared, workspace = answer
        # Blocks that wait for one another must all be on the GPU at once.
        assert 0 < members * groups <= multiprocessors and groups <= batch
        assert (members - 1) * columns < slots + width <= members * columns
        assert shared <= limit and workspace > 0
        if resident:
            assert shared > element * columns * slots
    # Larimar's memory is what the kernel is for: on each of these GPUs its state stays in shared memory.
    ((*_, resident, _, _),) = printed([f"stream 1 512 768 4 {multiprocessors} {limit}"])
    assert resident


# -- what no kernel does -------------------------------------------------------------------------------------

SOURCES = sorted(Path(ek.__file__).parent.rglob("*.py"))


def test_nothing_is_tuned_at_the_first_call():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "attr", getattr(node, "id", None))
            assert name not in ("autotune", "heuristics", "do_bench", "Autotuner"), f"{path}:{node.lineno}"


def transposed_halves(source: str) -> list[int]:
    """Lines of `tl.dot` with an operand that is transposed and not, just before that, made fp32.

    Triton from 3.4 up to, not including, 3.7.1 miscompiles `tl.dot(tl.trans(acc.to(bf16)), x)` on sm_90. The
    type of a plain name cannot be seen here, so what is transposed must be `x.to(tl.float32)`, itself or by a
    name.
    """
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        named = {
            target.id: node.value
            for node in ast.walk(function)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }

        def meant(node, named=named):
            """What a name was last given."""
            return named.get(node.id, node) if isinstance(node, ast.Name) else node

        def transposed(node) -> ast.expr | None:
            """What a node transposes, or None."""
            if isinstance(node, ast.Attribute) and node.attr == "T":
                return node.value
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr in ("trans", "permute", "transpose"):
                    free = isinstance(node.func.value, ast.Name) and node.func.value.id == "tl"
                    return node.args[0] if free else node.func.value
            return None

        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.dot":
                for operand in node.args[:2]:
                    parts = ast.walk(meant(operand))
                    inner = [meant(part) for node in parts if (part := transposed(node)) is not None]
                    if any(not ast.unparse(part).endswith(".to(tl.float32)") for part in inner):
                        found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("tl.dot(tl.trans(acc.to(tl.bfloat16)), x)", True),
        ("tl.dot(x, tl.trans(acc.to(dtype)), y)", True),
        ("tl.dot(acc.to(tl.float16).T, x)", True),
        ("tl.dot(tl.trans(w), x)", True),
        ("t = tl.trans(acc.to(tl.bfloat16)); tl.dot(t, x)", True),
        ("h = acc.to(tl.bfloat16); tl.dot(tl.trans(h), x)", True),
        ("tl.dot(h.trans(), x)", True),
        ("tl.dot(x, tl.trans(w.to(tl.float32)), y)", False),
        ("f = w.to(tl.float32); tl.dot(x, tl.trans(f))", False),
        ("tl.dot(x.to(tl.bfloat16), y)", False),
    ],
)
def test_the_inspection_sees_what_it_is_for(body, wrong):
    assert bool(transposed_halves(f"def kernel():\n    {body}\n")) == wrong


def test_no_dot_has_a_transposed_half_precision_operand():
    dots = 0
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        dots += source.count("tl.dot(")
        assert not transposed_halves(source), path
    assert dots > 0


def test_every_dot_says_its_precision():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.dot":
                assert "input_precision" in {word.arg for word in node.keywords}, f"{path}:{node.lineno}"
