"""The second moment of a layer's inputs."""

import torch
from torch import Tensor

from .. import _checks as check
from .._ops import ops


def second_moment_(accumulator: Tensor, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Add the uncentred second moment of a batch of layer inputs: `accumulator += Xᵀ X`.

    Args:
        accumulator: [in, in], fp32 or fp64, changed in place. Sums are taken in its type.
        inputs: X, [..., in], fp32, bf16, fp16 or fp64; every leading position is one sample.
        mask: [...], bool, True for the samples to count. Default: all.

    Returns:
        The accumulator.

    Raises:
        ValueError: wrong shape or device, or an input that is NaN or infinite; the accumulator is unchanged.
        TypeError: wrong dtype.

    Example:
        >>> moment = torch.zeros(1536, 1536, dtype=torch.float64)
        >>> ek.second_moment_(moment, hidden, mask=attention_mask.bool())

    Source: the covariance C = K Kᵀ of Meng et al. 2022 (arXiv 2202.05262), section 3.1.
    """
    check.floating("accumulator", accumulator, (torch.float32, torch.float64))
    check.floating("inputs", inputs)
    check.expect(inputs.dim() >= 1, "inputs", "shape [..., in]", list(inputs.shape))
    if mask is not None:
        check.expect(isinstance(mask, Tensor), "mask", "a bool tensor", type(mask).__name__, TypeError)
        check.shape("mask", mask, inputs.shape[:-1], "one entry a sample")
        mask = mask.reshape(-1)
    rows = inputs.detach().reshape(-1, inputs.shape[-1])
    ops.second_moment_(accumulator, rows, mask)
    return accumulator
