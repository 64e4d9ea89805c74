"""Small calls that reach every kernel, in sizes that lie on, before and behind the borders of its blocks."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch


class Case(NamedTuple):
    operator: str
    backend: str
    arguments: Callable[[], tuple]
    exact: bool  # whether the result is the reference's bit for bit


def _normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def _packed(size: int):
    return torch.randint(256, (-(-size // 8),), dtype=torch.uint8)


def _graft(size: int, dtype=torch.bfloat16):
    pre = _normal(size, dtype=dtype)
    return pre, (pre.double() + 0.1 * _normal(size)).to(dtype), 3 * _normal(size)


def _positive(*batch, order: int):
    square = _normal(*batch, order, order, dtype=torch.float64)
    return square @ square.mT / order + torch.eye(order, dtype=torch.float64)


def _low_rank(batch, rows, cols, rank, dtype):
    return (
        _normal(batch, rows, cols, dtype=dtype),
        _normal(batch, rows, rank),
        _normal(batch, rank, cols),
        0.7,
    )


def _residual(batch, rows, cols, count, dtype):
    keys = _normal(batch, count, cols)
    return _normal(batch, rows, cols, dtype=dtype), keys, _normal(batch, count, rows), 2 * keys.double()


def _stream(batch, count, slots, width, dtype=torch.float32):
    inverse = torch.linalg.inv(_positive(batch, order=slots)).to(dtype)
    rows = _normal(batch, count, slots, dtype=dtype) / slots**0.5, _normal(batch, count, width, dtype=dtype)
    return ((inverse + inverse.mT) / 2).contiguous(), _normal(batch, slots, width, dtype=dtype), *rows


def _accumulate(batch, count, slots, width, ragged):
    state = torch.zeros(batch, slots, slots), torch.zeros(batch, slots, width)
    if not ragged:
        return *state, _normal(batch, count, slots), _normal(batch, count, width), None, None
    ends = torch.tensor([0, *sorted(torch.randint(count, (batch - 1,)).tolist()), count])
    return *state, _normal(count, slots), _normal(count, width), _normal(count), ends


def _ridge(length, keys, values):
    q, k, v = (_normal(1, length, 2, width) / width**0.5 for width in (keys, keys, values))
    state = [torch.zeros(1, 2, *shape, dtype=torch.float64) for shape in ((keys, keys), (keys, values), ())]
    beta, decay = torch.rand(1, length, 2), -torch.rand(1, length, 2) / 9
    return q, k, v, beta, decay, torch.ones(2, keys), *state, None, True


def _top_k(*sizes, share=3):
    tensors = [_graft(size)[:2] for size in sizes]
    return [pre for pre, _ in tensors], [ft for _, ft in tensors], sum(sizes) // share


def _sparse(*counts, index=torch.int32):
    at = [torch.randperm(2 * count + 3)[:count].sort().values.to(index) for count in counts]
    weights = [_normal(2 * count + 3, dtype=torch.bfloat16) for count in counts]
    return weights, at, [_normal(count, dtype=torch.bfloat16) for count in counts]


def _faulty(*counts):
    """Indices from 0 to the last; some twice, some the number of entries, some below 0."""
    weights, at, _ = _sparse(*counts)
    for weight, indices in zip(weights, at, strict=True):
        indices.copy_(2 * torch.arange(len(indices)))
        indices[1::7] = indices[::7][: len(indices[1::7])].clone()
        indices[2::11] = len(weight)
        indices[3::13] = -1
        indices[-1] = len(weight) - 1
    return weights, at


def cases() -> Iterator[Case]:
    """Of each operator and backend the first is enough for most kinds of faults; the others meet bounds."""
    for size in (2048 + 517, 1, *range(2040, 2049)):
        pre, ft, logits = _graft(size)
        mask, gradient = _packed(size), _normal(size, dtype=torch.bfloat16)
        masks, out = [mask], [torch.full_like(pre, 7)]
        for operator, exact, arguments in (
            ("graft_blend", False, (pre, ft, logits, mask, 0.5)),
            ("graft_logits_gradient", False, (gradient, pre, ft, logits, mask, 0.5)),
            ("_foreach_graft_blend_", False, (out, [pre], [ft], [logits], masks, 0.5)),
            ("graft_mask_step_", False, ([logits], [gradient], [pre], [ft], masks, 0.5, 0.5, 0.01, out)),
            ("graft_blend_packed", True, (pre, ft, mask)),
            ("unpack_mask", True, (mask, size)),
        ):
            yield Case(operator, "triton", lambda arguments=arguments: arguments, exact)
    for shape in (
        (2, 33, 136, 17),
        (1, 32, 128, 16),
        (1, 64, 144, 1),
        *((1, n, 4 * n + 1, n) for n in range(1, 33)),
    ):
        for backend in ("triton", "cuda"):
            for dtype in (torch.bfloat16, torch.float32):
                yield Case("apply_low_rank_", backend, lambda s=shape, d=dtype: _low_rank(*s, d), False)
    for shape in (
        (2, 33, 136, 5),
        (2, 64, 2064, 9),
        (1, 32, 64, 1),
        *((1, n, 2 * n + 1, n) for n in range(1, 33)),
    ):
        for backend in ("triton", "cuda"):
            for dtype in (torch.bfloat16, torch.float32):
                yield Case("residual_gram", backend, lambda s=shape, d=dtype: _residual(*s, d), False)
    for batch, width, count in ((2, 136, 17), (1, 64, 16), (1, 33, 1), *((1, n, n) for n in range(1, 33))):
        arguments = _normal(batch, count, width), _normal(batch, width, width)
        yield Case("precondition", "triton", lambda arguments=arguments: arguments, False)
    for shape in ((2, 5, 17, 70), (1, 2, 64, 65), *((1, 2, n, n + 1) for n in range(1, 17))):
        yield Case("memory_stream", "triton", lambda s=shape: _stream(*s), False)
    for shape in ((2, 5, 33, 70), (1, 1, 32, 64), *((2, 3, n, 2 * n + 1) for n in range(1, 33, 2))):
        for ragged in (True, False):
            yield Case("memory_accumulate_", "triton", lambda s=shape, r=ragged: _accumulate(*s, r), False)
    for shape in ((40, 33, 70), (32, 16, 64), *((n, n, 2 * n + 1) for n in range(1, 33))):
        yield Case("ridge_memory", "triton", lambda s=shape: _ridge(*s), False)
    for shape in ((2, 35, 20, 30), (5, 16, 7, 9), (1, 17, 60, 4), (1, 15, 3, 90)):
        yield Case("memory_stream", "cuda", lambda s=shape: _stream(*s), False)
    for order, columns in ((23, 37), (1, 1), (9, 32), (33, 33)):
        for kind in ("cholesky", "unit_lower", "unit_upper"):
            system, right = _positive(2, order=order), _normal(2, order, columns)
            yield Case("small_solve", "cuda", lambda a=(system / order, right, kind): a, False)
    for size in (9007, 16384, *(2048 * part + n for part in range(4) for n in range(9))):
        yield Case("pack_mask", "cuda", lambda size=size: (torch.rand(size) < 0.5,), True)
    for sizes in ((30_000, 7), (20_483,)):  # so few that they are listed
        yield Case("top_k_mask", "cuda", lambda sizes=sizes: _top_k(*sizes, share=1000), True)
    for sizes in ((2500, 7), (6000, 0, 9), *((2040 + n, n) for n in range(1, 10))):
        yield Case("top_k_mask", "cuda", lambda sizes=sizes: _top_k(*sizes), True)
    for counts in ((1500, 3), (1024,), (1025, 1), (256, 512, 768)):
        yield Case("sparse_faults", "cuda", lambda c=counts: _faulty(*c), True)
        yield Case(
            "sparse_apply_",
            "cuda",
            lambda c=counts: (*(s := _sparse(*c)), [x.clone() for x in s[2]], False),
            True,
        )
