"""Which backend is asked first, on every device: one pure function."""

import pytest
import torch

import engram_kernels as ek
from engram_kernels.backends import NAMES
from engram_kernels.backends.order import GEMM_RANK, SIZED, SPLIT_KEYS, Size, order, size_of
from engram_kernels.ops.define import OPERATORS

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

CASES = [
    # CUDA reads a weight for few keys at the rate of memory; Triton fills too few warps.
    ("residual_gram", "cuda", Size(1, BF16), ("cuda", "torch")),
    ("residual_gram", "cuda", Size(SPLIT_KEYS, BF16), ("cuda", "torch")),
    # A bf16 weight meets the bf16 parts of more keys on tensor cores.
    ("residual_gram", "cuda", Size(SPLIT_KEYS + 1, BF16), ("torch",)),
    ("residual_gram", "cuda", Size(GEMM_RANK, FP32), ("cuda", "torch")),
    ("residual_gram", "cuda", Size(GEMM_RANK + 1, FP32), ("torch",)),
    # The library would convert an fp16 weight.
    ("residual_gram", "cuda", Size(100, FP16), ("cuda", "triton", "torch")),
    ("residual_gram", "cuda", Size(1000, FP16), ("torch",)),
    ("apply_low_rank_", "cuda", Size(16, BF16), ("cuda", "triton", "torch")),
    ("apply_low_rank_", "cuda", Size(100, BF16), ("torch",)),
    ("apply_low_rank_", "cuda", Size(100, FP16), ("cuda", "triton", "torch")),
    ("apply_low_rank_", "cuda", Size(1000, FP64), ("torch",)),
    # States that fit a program's registers, and those that do not.
    ("memory_stream", "cuda", Size(64, FP32), ("triton", "cuda", "torch")),
    ("memory_stream", "cuda", Size(65, FP32), ("cuda", "torch")),
    ("memory_stream", "cuda", Size(33, FP64), ("cuda", "torch")),
    ("graft_blend", "cuda", None, ("triton", "cuda", "torch")),
    ("residual_gram", "cpu", Size(1, BF16), ("cpu", "torch")),
    ("graft_blend", "mps", None, ("torch",)),
]


@pytest.mark.parametrize(("operator", "device", "size", "expected"), CASES)
def test_order(operator, device, size, expected):
    assert order(operator, device, size) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_order_ends_with_the_reference_and_names_backends_once(operator, device):
    for size in (None, *(Size(n, dtype) for n in (1, 50, 5000) for dtype in (BF16, FP16, FP32, FP64))):
        asked = order(operator, device, size)
        assert asked[-1] == "torch" and len(set(asked)) == len(asked) and set(asked) <= set(NAMES)


def test_sizes_are_those_of_the_call():
    weight, left, keys = torch.zeros(1, 4, 6).bfloat16(), torch.zeros(1, 4, 3), torch.zeros(1, 5, 6)
    assert size_of("apply_low_rank_", (weight, left, None, 1.0)) == Size(3, BF16)
    assert size_of("residual_gram", (weight, keys, None, None)) == Size(5, BF16)
    assert size_of("memory_stream", (torch.zeros(1, 7, 7), None, None, None)) == Size(7, FP32)
    assert size_of("graft_blend", (weight,)) is None and set(SIZED) <= set(OPERATORS)


def test_explain_follows_the_order():
    asked = [name for name, _ in ek.backends.explain("residual_gram", "cuda")]
    assert asked == ["cuda", "torch"]
