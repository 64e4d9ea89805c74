"""Shapes of real models, and the least bytes and operations of each operation: what a floor is made of.

    python bench/cases.py       the floors of real shapes at the rates of a data sheet

Each input is read once and each output written once; what a kernel reads again does not count. Shapes are
the published configurations'.
"""

from dataclasses import dataclass, field
from math import prod

import torch

FP32, FP64 = 4, 8  # bytes


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer; `key_value` is the width of its keys and values, all heads together."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    key_value: int
    kind: str  # "gpt2", "gptj" or "llama"
    biases: tuple[str, ...] = ()

    @property
    def output_projection(self) -> tuple[int, int]:
        """(out, in) of the matrix that facts are written into."""
        return self.hidden, self.intermediate

    def layer(self) -> list[tuple[int, ...]]:
        """The shapes of one layer's tensors."""
        h, m, kv = self.hidden, self.intermediate, self.key_value
        if self.kind == "gpt2":
            attention = [(h, 3 * h), (3 * h,), (h, h), (h,)]
            return [*attention, (h, m), (m,), (m, h), (h,), *[(h,)] * 4]
        if self.kind == "gptj":
            return [*[(h, h)] * 4, (m, h), (m,), (h, m), (h,), (h,), (h,)]
        attention = [(h, h), (kv, h), (kv, h), (h, h)]
        biases = [(h,), (kv,), (kv,)] if "attention" in self.biases else []
        return [*attention, *biases, (m, h), (m, h), (h, m), (h,), (h,)]

    def tensors(self, layers: int | None = None) -> list[tuple[int, ...]]:
        """The shapes of the tensors of all layers, or of the first few."""
        return self.layer() * (self.layers if layers is None else layers)


SMOLLM2 = Model("SmolLM2-135M", 30, 576, 1536, 192, "llama")
GPT2_MEDIUM = Model("GPT-2 medium", 24, 1024, 4096, 1024, "gpt2")
GPT2_XL = Model("GPT-2 XL", 48, 1600, 6400, 1600, "gpt2")
GPT_J = Model("GPT-J 6B", 28, 4096, 16384, 4096, "gptj")
LLAMA_3 = Model("Llama-3-8B", 32, 4096, 14336, 1024, "llama")
QWEN_25 = Model("Qwen2.5-7B", 28, 3584, 18944, 512, "llama", biases=("attention",))
MODELS = (SMOLLM2, GPT2_XL, GPT_J, LLAMA_3, QWEN_25)


def entries(shapes: list[tuple[int, ...]]) -> int:
    return sum(prod(shape) for shape in shapes)


@dataclass(frozen=True)
class Cost:
    """Bytes that must move, and operations by the type that they are done in."""

    traffic: float
    work: dict[torch.dtype, float] = field(default_factory=dict)

    def floor(self, copy: float, gemm: dict[str, float]) -> float:
        """The least seconds at a copy's bytes a second and a GEMM's operations a second by dtype."""
        arithmetic = sum(
            count / gemm[str(dtype).removeprefix("torch.")] for dtype, count in self.work.items()
        )
        return max(self.traffic / copy, arithmetic)


# -- the associative write -----------------------------------------------------------------------------------


def update(rows: int, cols: int, count: int, dtype: torch.dtype) -> Cost:
    """W += L R in place."""
    return Cost(
        2 * rows * cols * dtype.itemsize + FP32 * count * (rows + cols),
        {torch.float32: 2 * rows * cols * count},
    )


def residual(rows: int, cols: int, count: int, dtype: torch.dtype) -> Cost:
    """E = V − K Wᵀ, and G = K Pᵀ in fp64."""
    traffic = rows * cols * dtype.itemsize + count * (FP32 * (cols + 2 * rows) + FP64 * (cols + count))
    return Cost(traffic, {torch.float32: 2 * rows * cols * count, torch.float64: 2 * count * count * cols})


def precondition(cols: int, count: int, inverse: torch.dtype) -> Cost:
    """P = K C⁻¹ in fp64, the inverse ready in its type."""
    traffic = cols * cols * inverse.itemsize + count * cols * (FP32 + FP64)
    return Cost(traffic, {torch.float64: 2 * count * cols * cols})


def joint_write(rows: int, cols: int, count: int, dtype: torch.dtype) -> Cost:
    """P = K C⁻¹ and G in fp64, the solve, the residual, the update, from keys and values and a ready C⁻¹."""
    weight = rows * cols * dtype.itemsize
    # W for the residual, then read and written; the rest once.
    traffic = 3 * weight + FP64 * cols * cols + FP32 * count * (cols + rows)
    double = 2 * count * cols * cols + 2 * count * count * (cols + rows) + count**3 / 3
    return Cost(traffic, {torch.float32: 4 * rows * cols * count, torch.float64: double})


# -- grafting ------------------------------------------------------------------------------------------------


def packed(size: float) -> float:
    """Bytes of a mask of one bit an entry."""
    return size / 8


def blend(size: int, dtype: torch.dtype, base: bool) -> Cost:
    """θ from pre, ft and fp32 S."""
    return Cost(size * (3 * dtype.itemsize + FP32) + (packed(size) if base else 0))


def packed_blend(size: int, dtype: torch.dtype) -> Cost:
    """θ from pre, ft and bits."""
    return Cost(size * 3 * dtype.itemsize + packed(size))


def mask_step(size: int, dtype: torch.dtype, base: bool) -> Cost:
    """S read and written, and the next θ, from pre, ft and gradients."""
    return Cost(size * (4 * dtype.itemsize + 2 * FP32) + (packed(size) if base else 0))


def top_k(size: int, dtype: torch.dtype) -> Cost:
    """A mask of the largest |ft − pre|."""
    return Cost(size * 2 * dtype.itemsize + packed(size))


def sparse_apply(count: int, dtype: torch.dtype) -> Cost:
    """An int32 index, the value read and the weight exchanged: read, written, and kept."""
    return Cost(count * (4 + 4 * dtype.itemsize))


# -- episodic memory -----------------------------------------------------------------------------------------


def stream(batch: int, slots: int, width: int, count: int, dtype: torch.dtype) -> Cost:
    """P and M read and written, w and z read, readouts and leverages written."""
    state, row = slots * (slots + width), slots + 2 * width + 1
    return Cost(
        batch * (2 * state + count * row) * dtype.itemsize,
        {dtype: 4 * batch * count * slots * (slots + width)},
    )


def pseudo_inverse(slots: int, width: int, dtype: torch.dtype) -> Cost:
    """M⁺ by the Gram matrix of the smaller side, in fp64."""
    small, large = sorted((slots, width))
    return Cost(2 * slots * width * dtype.itemsize, {torch.float64: 4 * small * small * large + small**3 / 3})


# -- memories of sequences -----------------------------------------------------------------------------------


def ridge_memory(
    length: int, heads: int, keys: int, values: int, dtype: torch.dtype, factorisations: int = 0
) -> Cost:
    """q, k, v and β read, readouts and the fp64 state written; P, M and the sums changed at every token."""
    traffic = heads * (length * (2 * keys + 2 * values + 1) * dtype.itemsize + FP64 * keys * (keys + values))
    # P's product and update, M's two products and update, H and G; a factorisation a token in place of P's.
    token = 6 * keys * values + 2 * keys * (keys + values) + (0 if factorisations else 4 * keys * keys)
    return Cost(traffic, {torch.float64: heads * (length * token + factorisations * keys**3 / 3)})


def delta_memory(length: int, heads: int, keys: int, values: int, dtype: torch.dtype) -> Cost:
    """q, k, v and β read, readouts and the state written; a read at the key, a write, a read at the query."""
    traffic = heads * (length * (2 * keys + 2 * values + 1) * dtype.itemsize + FP32 * keys * values)
    return Cost(traffic, {dtype: 6 * heads * length * keys * values})


def real_cases() -> dict[str, Cost]:
    """Operations at the shapes of real models, by name."""
    bf16, found = torch.bfloat16, {}
    for model in MODELS:
        rows, cols = model.output_projection
        size, whole = rows * cols, entries(model.tensors())
        found |= {
            f"{model.name}: update, n = 16": update(rows, cols, 16, bf16),
            f"{model.name}: P, n = 16": precondition(cols, 16, torch.float64),
            f"{model.name}: joint write, n = 100": joint_write(rows, cols, 100, bf16),
            f"{model.name}: blend of one matrix, base": blend(size, bf16, base=True),
            f"{model.name}: mask step of all layers, base": mask_step(whole, bf16, base=True),
            f"{model.name}: sparse apply, 0.01 %": sparse_apply(whole // 10**4, bf16),
        }
    for slots, width in ((32, 64), (512, 768), (4096, 4096)):
        name = f"memory {slots}×{width}"
        found[f"{name}: 1,024 writes"] = stream(1, slots, width, 1024, torch.float32)
        found[f"{name}: pseudo-inverse"] = pseudo_inverse(slots, width, torch.float32)
    for length, heads, width in ((2048, 4, 64), (8192, 16, 128)):
        found[f"ridge memory, {length} tokens, {heads} heads of {width}"] = ridge_memory(
            length, heads, width, width, bf16
        )
    return found


# NVIDIA's data sheet of the H200 SXM: bytes a second, operations a second (dense; fp64 on tensor cores). A
# run measures its own.
SHEET_COPY = 4.8e12
SHEET_GEMM = {"bfloat16": 989e12, "float32": 67e12, "float64": 67e12}


def plan() -> list[str]:
    """A table of the real cases and their floors at the data sheet's rates."""
    lines = ["| case | MB | GFLOP | least ms on an H200, by its data sheet |", "| --- | ---: | ---: | ---: |"]
    for name, cost in real_cases().items():
        least = 1e3 * cost.floor(SHEET_COPY, SHEET_GEMM)
        work = sum(cost.work.values()) / 1e9
        lines.append(f"| {name} | {cost.traffic / 1e6:.1f} | {work:.2f} | {least:.4f} |")
    return lines


if __name__ == "__main__":
    print("\n".join(plan()))
