"""What a training step is given, and what it gives: batches and losses."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from .. import _checks as check
from ..errors import EngramError


def endless(batches: Iterable) -> Iterator:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise EngramError("batches: expected at least one for each step, got no more")


def moved(batch: object, model: nn.Module) -> object:
    if not isinstance(batch, Mapping):
        return batch
    device = next(model.parameters()).device
    if hasattr(batch, "to"):  # a BatchEncoding stays one
        # Of a copy: it moves what it holds, and the caller's batch stays where it is.
        return copy.copy(batch).to(device)
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def own_loss(model: nn.Module, batch: object) -> Tensor:
    if not isinstance(batch, Mapping):
        raise TypeError(f"batches: expected mappings where no loss_fn is given, got {type(batch).__name__}")
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(
            "batches: expected labels where no loss_fn is given, got none: the model gave no loss"
        )
    return loss


def checked(loss: Tensor) -> float:
    check.expect(isinstance(loss, Tensor), "loss_fn", "a scalar tensor", type(loss).__name__, TypeError)
    check.expect(loss.numel() == 1, "loss_fn", "a scalar tensor", f"shape {list(loss.shape)}")
    if not loss.requires_grad:
        raise EngramError("loss_fn: expected a loss that depends on the graftable weights, got none")
    value = loss.item()
    if not math.isfinite(value):
        raise EngramError(f"loss_fn: expected a finite loss, got {value}")
    return value
