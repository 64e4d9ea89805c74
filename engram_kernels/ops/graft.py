"""Grafting: the masked blend of two models, packed masks, top-k masks, sparse writes."""

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from .. import _checks as check
from .. import autograd
from .._ops import compute_dtype, ops


def graft_blend(
    pre: Tensor, ft: Tensor, logits: Tensor, base: Tensor | None = None, bias: float = 0.0
) -> Tensor:
    """Blend a fine-tuned weight into a pre-trained one: `θ = pre + γ (ft − pre)`, `γ = σ(s (S − bias))`.

    `s` is −1 where the base mask's bit is 1 and +1 elsewhere, so that S encodes a flip of the base mask:
    `γ = base + (1 − 2 base) σ(S − bias)`. Computed from the nearer end, in fp32 (fp64 for fp64 weights) and
    rounded once: a gate that is 0 or 1 gives `pre` or `ft` exactly
    (but for the sign of a zero), as long as `ft − pre` is finite.

    Differentiable in pre, ft and logits; the gate is computed again in backward:
    `dS = s g (ft − pre) γ (1 − γ)`, `dft = g γ`, `dpre = g (1 − γ)`.

    Args:
        pre: [...], fp32, bf16, fp16 or fp64. Strided tensors are copied.
        ft: [...], of pre's shape and dtype.
        logits: S, [...], of pre's shape, any floating type; converted to fp32 (fp64 for fp64 weights).
        base: packed bit mask of `pack_mask`, uint8 [⌈numel / 8⌉]. Default: no bit is set.
        bias: subtracted from S. Panigrahi et al. use 10, so that S near 0 keeps the base mask.

    Returns:
        θ, a new contiguous tensor of pre's shape and dtype. NaN in gives NaN out.

    Raises:
        ValueError: wrong shape, device or bias.
        TypeError: wrong dtype.

    Example:
        >>> theta = ek.graft_blend(pre, ft, logits, base=ek.graft_top_k([pre], [ft], k)[0], bias=10.0)

    Source: Panigrahi et al. 2023 (arXiv 2302.06600), section 2.
    """
    for name, tensor in (("pre", pre), ("ft", ft), ("logits", logits)):
        check.floating(name, tensor)
    _same_shape("ft", ft, pre)
    _same_shape("logits", logits, pre)
    _check_packed("base", base)
    check.number("bias", bias)
    x = logits.to(compute_dtype(pre))
    blended = autograd.GraftBlend.apply(
        pre.reshape(-1).contiguous(),
        ft.reshape(-1).contiguous(),
        x.reshape(-1).contiguous(),
        base,
        float(bias),
    )
    return blended.view(pre.shape)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool mask into bits: entry i, in row-major order, is bit i % 8 of byte i // 8.

    Args:
        mask: [...], bool.

    Returns:
        uint8 [⌈numel / 8⌉], the least significant bit first; bits beyond the last entry are 0.

    Raises:
        TypeError: not a bool tensor.

    Example:
        >>> ek.pack_mask(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    check.expect(isinstance(mask, Tensor), "mask", "a bool tensor", type(mask).__name__, TypeError)
    return ops.pack_mask(mask.reshape(-1).contiguous())


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack the bits of `pack_mask`.

    Args:
        packed: uint8 [⌈numel / 8⌉].
        shape: the mask's shape.

    Returns:
        bool, of that shape.

    Raises:
        ValueError: packed has another size than the shape asks for.
        TypeError: packed is not uint8.

    Example:
        >>> ek.unpack_mask(torch.tensor([5], dtype=torch.uint8), (3,))
        tensor([ True, False,  True])
    """
    check.expect(isinstance(packed, Tensor), "packed", "a uint8 tensor", type(packed).__name__, TypeError)
    sizes = isinstance(shape, Sequence) and all(isinstance(x, (int, torch.SymInt)) for x in shape)
    check.expect(sizes, "shape", "a sequence of integers", shape, TypeError)
    check.expect(all(size >= 0 for size in shape), "shape", "sizes of at least 0", list(shape))
    return ops.unpack_mask(packed, math.prod(shape)).view(tuple(shape))


def graft_blend_packed(pre: Tensor, ft: Tensor, mask: Tensor) -> Tensor:
    """Take the fine-tuned weight where the mask's bit is 1 and the pre-trained one elsewhere, bit for bit.

    Differentiable in pre and ft.

    Args:
        pre: [...], fp32, bf16, fp16 or fp64. Strided tensors are copied.
        ft: [...], of pre's shape and dtype.
        mask: packed bit mask of `pack_mask`, uint8 [⌈numel / 8⌉].

    Returns:
        A new contiguous tensor of pre's shape and dtype.

    Raises:
        ValueError: wrong shape or device.
        TypeError: wrong dtype.

    Example:
        >>> theta = ek.graft_blend_packed(pre, ft, ek.pack_mask(mask))

    Source: Panigrahi et al. 2023 (arXiv 2302.06600), eq. 1.
    """
    for name, tensor in (("pre", pre), ("ft", ft)):
        check.floating(name, tensor)
    _same_shape("ft", ft, pre)
    check.expect(isinstance(mask, Tensor), "mask", "a uint8 tensor", type(mask).__name__, TypeError)
    blended = autograd.GraftBlendPacked.apply(pre.reshape(-1).contiguous(), ft.reshape(-1).contiguous(), mask)
    return blended.view(pre.shape)


def graft_top_k(pre: Sequence[Tensor], ft: Sequence[Tensor], k: int) -> list[Tensor]:
    """Return the masks of the k largest `|ft − pre|` over all tensors together.

    Exactly k bits are set. Of equal differences the first count: in the order of the list, then row-major.
    Differences are taken in fp32 (fp64 for fp64 weights), never rounded to the weights' type. A radix select
    by histograms: no tensor of differences is made.

    Args:
        pre: tensors of any shapes, all on one device; fp32, bf16 and fp16 may be mixed, fp64 not with others.
        ft: tensors of the same shapes and dtypes.
        k: the number of entries, 0 to the number of all.

    Returns:
        A packed mask of `pack_mask` for each tensor.

    Raises:
        ValueError: wrong shape, device or k, or a difference that is NaN or infinite.
        TypeError: wrong dtype.

    Example:
        >>> masks = ek.graft_top_k(pre, ft, round(1e-4 * sum(p.numel() for p in pre)))

    Source: the base mask of Panigrahi et al. 2023 (arXiv 2302.06600), section 2.
    """
    pre, ft = _list("pre", pre), _list("ft", ft)
    _same_shapes("ft", ft, pre)
    check.integer("k", k)
    if not pre:
        check.expect(k == 0, "k", "0, the number of entries", k)
        return []
    return ops.top_k_mask([_flat(x) for x in pre], [_flat(x) for x in ft], k)[0]


def top_k_mask(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Return the masks of the k largest scores over all tensors together, signs counted.

    As `graft_top_k`, for scores of your own.

    Args:
        scores: tensors of any shapes, all on one device; fp64 not mixed with other types.
        k: the number of entries, 0 to the number of all.

    Returns:
        A packed mask of `pack_mask` for each tensor.

    Raises:
        ValueError: wrong device or k, or a score that is NaN or infinite.
        TypeError: wrong dtype.

    Example:
        >>> masks = ek.top_k_mask([weight.grad.square() for weight in weights], k=1000)
    """
    scores = _list("scores", scores)
    check.integer("k", k)
    if not scores:
        check.expect(k == 0, "k", "0, the number of entries", k)
        return []
    return ops.top_k_mask([_flat(x) for x in scores], [], k)[0]


def _foreach_graft_blend_(
    out: Sequence[Tensor],
    pre: Sequence[Tensor],
    ft: Sequence[Tensor],
    logits: Sequence[Tensor],
    base: Sequence[Tensor] | None = None,
    bias: float = 0.0,
) -> list[Tensor]:
    """Blend a whole model in one launch: `out[i] = graft_blend(pre[i], ft[i], logits[i], base[i], bias)`.

    Not recorded by autograd.

    Args:
        out: tensors of any shapes, changed in place; such as a model's own parameters.
        pre, ft: tensors of the same shapes and dtypes, apart from `out` in memory.
        logits: S, tensors of the same shapes, fp32 (fp64 for fp64 weights).
        base: packed bit masks. Default: no bit is set.
        bias: subtracted from S.

    Returns:
        `out`.

    Raises:
        ValueError: wrong shape, device, bias or number of tensors; memory that is written twice, or written
            and read; nothing is changed.
        TypeError: wrong dtype.

    Example:
        >>> ek._foreach_graft_blend_(parameters, pre, ft, logits, base, bias=10.0)

    Source: Panigrahi et al. 2023 (arXiv 2302.06600), section 2.
    """
    out, pre, ft, logits = _list("out", out), _list("pre", pre), _list("ft", ft), _list("logits", logits)
    for name, tensors in (("pre", pre), ("ft", ft), ("logits", logits)):
        _same_shapes(name, tensors, out)
    masks = _masks(base, len(out))
    check.number("bias", bias)
    if out:
        with _Written("out", out, pre, ft, logits, masks) as targets:
            ops._foreach_graft_blend_(
                targets,
                [_flat(x) for x in pre],
                [_flat(x) for x in ft],
                [_flat(x) for x in logits],
                masks,
                float(bias),
            )
    return out


def graft_mask_step_(
    logits: Sequence[Tensor],
    grads: Sequence[Tensor],
    pre: Sequence[Tensor],
    ft: Sequence[Tensor],
    base: Sequence[Tensor] | None = None,
    bias: float = 0.0,
    lr: float = 1.0,
    l1: float = 0.0,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Take one gradient step on the masks of a whole model, and write the next θ, in one launch.

    With `g = ∂loss/∂θ` and the gate γ of `graft_blend`:
    `S ← S − lr · s γ (1 − γ) (g (ft − pre) + l1)`, which is the gradient of `loss + l1 Σ γ`; then
    `out[i] = graft_blend(pre[i], ft[i], S[i], base[i], bias)`. Not recorded by autograd.

    Args:
        logits: S, tensors of any shapes, fp32 (fp64 for fp64 weights), changed in place.
        grads: g, tensors of the same shapes and of pre's dtypes, taken at θ of the present S.
        pre, ft: tensors of the same shapes.
        base: packed bit masks. Default: no bit is set.
        bias: subtracted from S.
        lr: the learning rate.
        l1: the weight of the sum of all gates.
        out: where the next θ is written, apart from all others in memory. Default: nowhere.

    Returns:
        `logits`.

    Raises:
        ValueError: wrong shape, device, number of tensors, bias, lr or l1; memory that is written twice, or
            written and read; nothing is changed.
        TypeError: wrong dtype.

    Example:
        >>> ek.graft_mask_step_(logits, [p.grad for p in parameters], pre, ft, base, 10.0, lr, out=parameters)

    Source: Panigrahi et al. 2023 (arXiv 2302.06600), section 2; with l1, He et al. 2024 (arXiv 2408.13656).
    """
    logits, grads, pre, ft = (
        _list("logits", logits),
        _list("grads", grads),
        _list("pre", pre),
        _list("ft", ft),
    )
    out = [] if out is None else _list("out", out)
    for name, tensors in (("grads", grads), ("pre", pre), ("ft", ft), ("out", out)):
        if name != "out" or out:
            _same_shapes(name, tensors, logits)
    masks = _masks(base, len(logits))
    for name, value in (("bias", bias), ("lr", lr), ("l1", l1)):
        check.number(name, value)
    if logits:
        read = grads, pre, ft, masks
        with (
            _Written("logits", logits, out, *read) as targets,
            _Written("out", out, logits, *read) as blended,
        ):
            ops.graft_mask_step_(
                targets,
                [_flat(x) for x in grads],
                [_flat(x) for x in pre],
                [_flat(x) for x in ft],
                masks,
                float(bias),
                float(lr),
                float(l1),
                blended,
            )
    return logits


def sparse_apply_(
    weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]
) -> list[Tensor]:
    """Write values into positions of many tensors in one launch, and return what they overwrote.

    `values[i]` go to the row-major positions `indices[i]` of `weights[i]`, bit for bit. The result is the
    undo: `sparse_apply_(weights, indices, sparse_apply_(weights, indices, values))` changes nothing.

    Args:
        weights: tensors of any shapes and floating types, all on one device, changed in place.
        indices: [n] each, int32 or int64; in any order, fastest in ascending order.
        values: [n] each, of the weight's dtype.

    Returns:
        The overwritten values, [n] each.

    Raises:
        ValueError: an index out of range or given twice, wrong shape, device or number of tensors, memory
            that is written twice, or written and read; nothing is changed.
        TypeError: wrong dtype.

    Example:
        >>> before = ek.sparse_apply_(weights, graft.indices, graft.values)
        >>> ek.sparse_apply_(weights, graft.indices, before)
    """
    weights, indices, values = (
        _list("weights", weights),
        _list("indices", indices),
        _list("values", values),
    )
    for name, tensors in (("indices", indices), ("values", values)):
        check.expect(len(tensors) == len(weights), name, f"{len(weights)} tensors, as weights", len(tensors))
    if not weights:
        return []
    indices = [_flat(index) for index in indices]
    if len({index.dtype for index in indices}) > 1:
        indices = [index.long() if index.dtype == torch.int32 else index for index in indices]
    values = [_flat(x) for x in values]
    overwritten = [torch.empty_like(x) for x in values]
    with _Written("weights", weights, indices, values) as targets:
        ops.sparse_apply_(targets, indices, values, overwritten)
    return overwritten


class _Written:
    """Flat tensors to write to: views of contiguous memory; copies of other, put back at the end."""

    def __init__(self, name: str, tensors: list[Tensor], *others: list[Tensor]):
        self.name, self.others = name, others
        self.tensors = [tensor.detach() for tensor in tensors]

    def __enter__(self) -> list[Tensor]:
        strided = [i for i, tensor in enumerate(self.tensors) if not tensor.is_contiguous()]
        if strided:
            # The operator sees a copy, and cannot see what else lies where that goes back to.
            spans = [check.span(tensor) for tensor in chain(self.tensors, *self.others)]
            for i in strided:
                check.no_overlap(self.name, self.tensors[i])
                begin, end = spans[i]
                shared = any(first < end and begin < last for first, last in spans[:i] + spans[i + 1 :])
                check.expect(not shared, self.name, "memory of its own for a strided tensor", "shared memory")
        self.flat = [tensor.reshape(-1) for tensor in self.tensors]
        return self.flat

    def __exit__(self, error, *details) -> None:
        if error is None:
            for tensor, flat in zip(self.tensors, self.flat, strict=True):
                if not tensor.is_contiguous():
                    tensor.copy_(flat.view(tensor.shape))


def _flat(tensor: Tensor) -> Tensor:
    if tensor.dim() == 1 and tensor.is_contiguous() and not tensor.requires_grad:
        return tensor
    return tensor.detach().reshape(-1).contiguous()


def _list(name: str, tensors: object) -> list[Tensor]:
    known = isinstance(tensors, Sequence) and not isinstance(tensors, Tensor)
    check.expect(known, name, "a list of tensors", type(tensors).__name__, TypeError)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    return list(tensors)


def _same_shape(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.shape != like.shape:
        check.shape(name, tensor, like.shape, "as the other tensors")


def _same_shapes(name: str, tensors: list[Tensor], like: list[Tensor]) -> None:
    check.expect(len(tensors) == len(like), name, f"{len(like)} tensors", len(tensors))
    for tensor, other in zip(tensors, like, strict=True):
        _same_shape(name, tensor, other)


def _check_packed(name: str, mask: Tensor | None) -> None:
    known = mask is None or isinstance(mask, Tensor)
    check.expect(known, name, "a packed mask", type(mask).__name__, TypeError)


def _masks(base: Sequence[Tensor] | None, count: int) -> list[Tensor]:
    masks = [] if base is None else _list("base", base)
    check.expect(base is None or len(masks) == count, "base", f"{count} packed masks", len(masks))
    return masks
