"""How operators run on tensors that processes divide among them (DTensor), where that takes no communication.

Registered when an operator first meets one: importing DTensor takes a while.
"""

from __future__ import annotations

from typing import Any

import torch

_registered: list[bool] = []


def is_divided(tensor: object) -> bool:
    """Whether a tensor may be a DTensor: of a class of its own, with a mesh."""
    return type(tensor) is not torch.Tensor and hasattr(tensor, "device_mesh")


def register(ops: Any) -> None:
    """Tell DTensor of these operators which parts of the arguments give which part of the result."""
    if _registered:
        return
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    whole = Replicate()

    @register_sharding(ops.apply_low_rank_.default)
    def _apply(weight, _left, _right, _alpha):
        # weight [B, out, in], left [B, out, n], right [B, n, in]: by rows, by columns, or by matrices.
        rows, columns = Shard(weight.ndim - 2), Shard(weight.ndim - 1)
        by_matrices = [([], [Shard(0), Shard(0), Shard(0), None])] if weight.ndim == 3 else []
        return [
            ([], [whole, whole, whole, None]),
            ([], [rows, rows, whole, None]),
            ([], [columns, whole, columns, None]),
            *by_matrices,
        ]

    def elementwise(count: int):
        """By entries; the eight of a byte of a base mask may be of two ranks, which keeps all whole."""

        def placements(*arguments):
            kinds = [whole] if arguments[count] is not None else [whole, Shard(0)]
            base = whole if arguments[count] is not None else None
            return [([kind], [*[kind] * count, base, None]) for kind in kinds]

        return placements

    register_sharding(ops.graft_blend.default)(elementwise(3))
    register_sharding(ops.graft_logits_gradient.default)(elementwise(4))
    _registered.append(True)
