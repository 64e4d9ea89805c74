"""The uncentred second moment of a layer's inputs."""

import torch
from torch import Tensor

from .. import _checks as check
from .define import define


def _second_moment_arguments(accumulator: Tensor, inputs: Tensor, mask: Tensor | None) -> None:
    check.floating("accumulator", accumulator, (torch.float32, torch.float64))
    check.floating("inputs", inputs)
    check.expect(inputs.dim() == 2, "inputs", "two dimensions [rows, in]", list(inputs.shape))
    width = inputs.shape[-1]
    check.shape("accumulator", accumulator, (width, width), "[in, in]")
    check.same_device("inputs", inputs, accumulator.device)
    if mask is not None:
        check.expect(mask.dtype == torch.bool, "mask", "a bool tensor", mask.dtype, TypeError)
        check.shape("mask", mask, inputs.shape[:-1], "one entry a row of inputs")
        check.same_device("mask", mask, accumulator.device)


def _second_moment_values(accumulator: Tensor, inputs: Tensor, mask: Tensor | None) -> None:
    check.own_memory("inputs", inputs, accumulator)
    check.finite("inputs", inputs if mask is None else inputs[mask])


define(
    "second_moment_(Tensor(a!) accumulator, Tensor inputs, Tensor? mask) -> ()",
    _second_moment_arguments,
    fake=lambda accumulator, inputs, mask: None,
    values=_second_moment_values,
)
