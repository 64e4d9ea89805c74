"""fp32 factors as sums of bf16 parts, so that a bf16 weight's GEMMs run on tensor cores and lose nothing.

fp32 has 24 bits, bf16 has 8 and the same exponents: three parts hold an fp32 number exactly, from 1e-33 to
bf16's largest, 3.39e38. Products of bf16 numbers are exact in fp32, so what is lost is what summing in fp32
loses, 1e-7.
"""

import torch
from torch import Tensor


def parts(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split fp32 numbers: `high + middle + low`, exactly, each bf16."""
    high = tensor.bfloat16()
    rest = tensor - high
    middle = rest.bfloat16()
    return high, middle, (rest - middle).bfloat16()


def product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply bf16 batches of matrices, [B, n, k] by [B, k, m], summed and kept in fp32."""
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def residual(weight: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """E = V − K Wᵀ [B, n, out] for a bf16 weight, read once; K = high + middle + low."""
    high, middle, low = product(torch.cat(parts(keys), 1), weight.mT).chunk(3, 1)
    return values - (low + middle + high)


def factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """L [B, out, 6n] and R [B, 6n, in] in bf16, whose product is L R but for terms of 2⁻²⁴ of it."""
    high, middle, low = parts(left)
    tall, mid, small = parts(right)
    # The small terms first, as they are summed in this order.
    return (
        torch.cat([low, high, middle, middle, high, high], 2),
        torch.cat([tall, small, mid, tall, mid, tall], 1),
    )


def add_(weight: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """W += α L R for a bf16 weight on a GPU, in one GEMM that rounds once."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_bf16_reduced_precision_reduction
    flags.allow_bf16_reduced_precision_reduction = False  # parts of a sum are not to be rounded to bf16
    try:
        weight.baddbmm_(*factors(alpha * left, right))
    finally:
        flags.allow_bf16_reduced_precision_reduction = before
