"""The second moment of a layer's inputs."""

import math

import torch
from torch import Tensor

from .. import _checks as check
from .define import define

__all__ = ["second_moment_"]


def _check(accumulator: Tensor, inputs: Tensor, mask: Tensor | None) -> None:
    check.floating("accumulator", accumulator, (torch.float32, torch.float64))
    check.floating("inputs", inputs)
    check.expect(inputs.dim() >= 1, "inputs", "shape [..., in]", list(inputs.shape))
    width = inputs.shape[-1]
    check.shape("accumulator", accumulator, (width, width), "[in, in]")
    check.same_device("inputs", inputs, accumulator.device)
    check.no_overlap("accumulator", accumulator)
    if mask is not None:
        check.tensor("mask", mask, (torch.bool,))
        check.shape("mask", mask, inputs.shape[:-1], "[...], one entry a row of inputs")
        check.same_device("mask", mask, accumulator.device)


def _canonical(accumulator: Tensor, inputs: Tensor, mask: Tensor | None) -> None:
    check.dimensions("inputs", inputs, "[rows, in]")


def _values(accumulator: Tensor, inputs: Tensor, mask: Tensor | None) -> None:
    check.finite("inputs", inputs if mask is None else inputs[mask])


def _guard(accumulator: Tensor, inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple]:
    if mask is not None:
        inputs = torch.where(mask.unsqueeze(-1), inputs, 0)
    bad = check.not_finite(inputs)
    return bad, (accumulator, inputs.masked_fill(bad, 0), None)


_second_moment_ = define(
    "second_moment_(Tensor(a!) accumulator, Tensor inputs, Tensor? mask) -> ()",
    _check,
    _canonical,
    fake=lambda accumulator, inputs, mask: None,
    apart=lambda accumulator, inputs, mask: check.own_memory(accumulator, inputs=inputs),
    values=_values,
    guard=_guard,
    complaint="second_moment_: expected finite inputs, got NaN or infinite; the accumulator is unchanged",
)


def second_moment_(accumulator: Tensor, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Add the uncentred second moment of a batch of layer inputs: `accumulator += Xᵀ X`.

    Args:
        accumulator: [in, in], fp32 or fp64, changed in place. Sums are taken in its type.
        inputs: X, [..., in], fp32, bf16, fp16 or fp64; every leading position is one sample.
        mask: [...], bool, True for the samples to count. Default: all.

    Returns:
        The accumulator.

    Raises:
        ValueError: wrong shape or device, an input that is NaN or infinite, or an accumulator whose elements
            overlap or that is also read; the accumulator is unchanged.
        TypeError: wrong dtype.

    Example:
        >>> moment = torch.zeros(1536, 1536, dtype=torch.float64)
        >>> ek.second_moment_(moment, hidden, mask=attention_mask.bool())

    Source: the covariance C = K Kᵀ of Meng et al. 2022 (arXiv 2202.05262), section 3.1.
    """
    _check(accumulator, inputs, mask)
    rows = inputs.detach().reshape(math.prod(inputs.shape[:-1]), inputs.shape[-1])
    _second_moment_(accumulator, rows, None if mask is None else mask.reshape(-1))
    return accumulator
