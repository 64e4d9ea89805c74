"""How operators run under `torch.func.vmap`: the new dimension is folded into the one for batches."""

from collections.abc import Callable

import torch
from torch import Tensor


def folded(operator: Callable) -> Callable:
    """The rule of an operator whose tensors all begin with one dimension for batches, or for entries."""

    def rule(info, in_dims, *args):
        size = info.batch_size
        merged = [
            _front(x, d, size).flatten(0, 1) if isinstance(x, Tensor) else x
            for x, d in zip(args, in_dims, strict=True)
        ]
        results = operator(*merged)
        if isinstance(results, Tensor):
            return results.unflatten(0, (size, -1)), 0
        return tuple(result.unflatten(0, (size, -1)) for result in results), (0,) * len(results)

    return rule


def with_mask(operator: Callable, place: int) -> Callable:
    """The rule of an operator on flat tensors, with a packed mask among its arguments, or None there."""
    plain = folded(operator)

    def rule(info, in_dims, *args):
        mask, first = args[place], args[0]
        entries = first.numel() // (1 if in_dims[0] is None else info.batch_size)
        if mask is None or entries % 8 == 0:
            return plain(info, in_dims, *args)
        # Masks that do not fill their last byte do not follow one on the other.
        fronts = [
            _front(x, d, info.batch_size) if isinstance(x, Tensor) else x
            for x, d in zip(args, in_dims, strict=True)
        ]
        rows = [
            operator(*(x[i] if isinstance(x, Tensor) else x for x in fronts)) for i in range(info.batch_size)
        ]
        return torch.stack(rows), 0

    return rule


def _front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The tensor with the new dimension in front, repeated where it has none; contiguous."""
    moved = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return moved.contiguous()
