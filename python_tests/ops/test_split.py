"""fp32 as three bf16 parts: exact, and in products as exact as fp32. A CPU sums what a GPU's GEMMs will."""

import pytest
import torch

from engram_kernels.backends.torch import split


def test_parts_are_exact():
    numbers = torch.randn(100_000) * 10.0 ** torch.randint(-30, 30, (100_000,))
    numbers = torch.cat([numbers, torch.tensor([0.0, -0.0, 1.0, 3.38e38, 1 + 2**-23, -(1 + 2**-8 + 2**-16)])])
    high, middle, low = split.parts(numbers)
    assert {part.dtype for part in (high, middle, low)} == {torch.bfloat16}
    assert torch.equal(high.double() + middle.double() + low.double(), numbers.double())


@pytest.mark.parametrize("count", [1, 16, 100])
def test_residual_error(count):
    weight = torch.randn(2, 48, 1536).bfloat16()
    keys, values = torch.randn(2, count, 1536), torch.randn(2, count, 48)
    wide = keys.double() @ weight.double().mT
    got = split.residual(weight, keys, values)
    assert got.dtype == torch.float32
    # Beside the products that cancel, as fp32 has it.
    error = (got.double() - (values.double() - wide)).norm() / wide.norm()
    assert error <= 2e-7, float(error)
    one_part = (split.product(split.parts(keys)[0], weight.mT) - wide).norm() / wide.norm()
    assert one_part > 1e-3


@pytest.mark.parametrize("count", [1, 16, 100])
def test_factors_error(count):
    left, right = torch.randn(2, 40, count), torch.randn(2, count, 56)
    wide = left.double() @ right.double()
    tall, flat = split.factors(left, right)
    assert tall.shape == (2, 40, 6 * count) and flat.shape == (2, 6 * count, 56)
    error = (split.product(tall, flat) - wide).norm() / wide.norm()
    assert error <= 2e-7, float(error)


def test_add_is_rounded_once():
    """The one GEMM's arguments; where its sum is rounded is the library's."""
    weight, left, right = torch.randn(1, 40, 56).bfloat16(), torch.randn(1, 40, 4), torch.randn(1, 4, 56)
    expected = (weight.double() - 0.5 * left.double() @ right.double()).bfloat16()
    flags = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    split.add_(weight, left, right, -0.5)
    assert flags == torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert (weight.double() - expected.double()).abs().max() <= 2**-7 * expected.abs().max()
