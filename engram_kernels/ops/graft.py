"""Grafting: the masked blend of two models, of one tensor and of all, and the step of its masks."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .. import _checks as check
from .._linalg import compute_dtype
from .batching import with_mask
from .define import apply, backward, define
from .lists import (
    Spans,
    Written,
    as_lists,
    as_masks,
    check_alike,
    check_count,
    check_dense,
    check_flat,
    check_like,
    check_masks,
    check_packed,
    check_weights,
    dense,
)

__all__ = ["_foreach_graft_blend_", "graft_blend", "graft_mask_step_"]


# On GPUs they copy a table of addresses to the device, which a CUDA graph does not keep; a plan has it there.
_TABLE = (torch.Tag.cudagraph_unsafe,)


def _check_pair(pre: Tensor, ft: Tensor, base: Tensor | None) -> None:
    check.floating("pre", pre)
    check.floating("ft", ft)
    check_like("ft", ft, pre, pre.dtype)
    if base is not None:
        check_packed("base", base, pre.numel(), pre.device)


# -- graft_blend, graft_logits_gradient ----------------------------------------------------------------------


def _check_blend(pre: Tensor, ft: Tensor, logits: Tensor, base: Tensor | None, bias: float) -> None:
    _check_pair(pre, ft, base)
    check.floating("logits", logits)
    check_like("logits", logits, pre, logits.dtype)
    check.number("bias", bias)


def _canonical_blend(pre: Tensor, ft: Tensor, logits: Tensor, base: Tensor | None, bias: float) -> None:
    check_flat(pre=pre, ft=ft, logits=logits, base=base)
    check.floating("logits", logits, (compute_dtype(pre),))


def _check_gradient(gradient: Tensor, pre: Tensor, *rest) -> None:
    _check_blend(pre, *rest)
    check_like("gradient", gradient, pre, pre.dtype)


def _canonical_gradient(gradient: Tensor, pre: Tensor, *rest) -> None:
    _canonical_blend(pre, *rest)
    check_flat(gradient=gradient)


_graft_blend = define(
    "graft_blend(Tensor pre, Tensor ft, Tensor logits, Tensor? base, float bias) -> Tensor",
    _check_blend,
    _canonical_blend,
    fake=lambda pre, ft, logits, base, bias: torch.empty_like(pre),
    batched=partial(with_mask, place=3),
)

_graft_logits_gradient = define(
    "graft_logits_gradient(Tensor gradient, Tensor pre, Tensor ft, Tensor logits, Tensor? base, float bias)"
    " -> Tensor",
    _check_gradient,
    _canonical_gradient,
    fake=lambda gradient, pre, ft, logits, base, bias: torch.empty_like(logits),
    batched=partial(with_mask, place=4),
)


class GraftBlend(torch.autograd.Function):
    """θ = pre + γ (ft − pre) [N], γ = σ(s (S − bias)).

    dS = s g (ft − pre) γ (1 − γ), dft = g γ, dpre = g (1 − γ).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(pre: Tensor, ft: Tensor, logits: Tensor, base: Tensor | None, bias: float) -> Tensor:
        return _graft_blend(pre, ft, logits, base, bias)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        *saved, ctx.bias = inputs
        ctx.save_for_backward(*saved)

    @backward
    def backward(ctx, gradient: Tensor):
        pre, ft, logits, base = ctx.saved_tensors
        gradient = gradient.contiguous()
        d_pre = d_ft = d_logits = None
        if ctx.needs_input_grad[0]:
            d_pre = _graft_blend(gradient, torch.zeros_like(gradient), logits, base, ctx.bias)
        if ctx.needs_input_grad[1]:
            d_ft = _graft_blend(torch.zeros_like(gradient), gradient, logits, base, ctx.bias)
        if ctx.needs_input_grad[2]:
            d_logits = _graft_logits_gradient(gradient, pre, ft, logits, base, ctx.bias)
        return d_pre, d_ft, d_logits, None, None


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
    _check_blend(pre, ft, logits, base, bias)
    flat = [x.reshape(-1).contiguous() for x in (pre, ft, logits.to(compute_dtype(pre)))]
    return apply(GraftBlend, *flat, base, float(bias)).view(pre.shape)


# -- _foreach_graft_blend_ -----------------------------------------------------------------------------------


def check_lists(out, pre, ft, logits, base, bias) -> None:
    """Check the lists of a blend; `out` may be empty."""
    check_count("pre", pre, logits)
    check_weights("pre", pre)
    dtypes = [weight.dtype for weight in pre]
    check_alike("ft", ft, pre, dtypes)
    check_alike("logits", logits, pre, [compute_dtype(weight) for weight in pre])
    if base:
        check_masks("base", base, pre)
    if out:
        check_alike("out", out, pre, dtypes)
    check.number("bias", bias)


def _check_foreach(out, pre, ft, logits, base, bias) -> None:
    check_count("logits", logits, out)
    check_lists(out, pre, ft, logits, base, bias)


def _canonical_foreach(out, pre, ft, logits, base, bias) -> None:
    check_dense(out=out, pre=pre, ft=ft, logits=logits, base=base)


def _foreach_apart(out, pre, ft, logits, base, bias) -> None:
    Spans(out=out).check_apart(pre, ft, logits, base)


_foreach_blend_ = define(
    "_foreach_graft_blend_(Tensor(a!)[] out, Tensor[] pre, Tensor[] ft, Tensor[] logits, Tensor[] base,"
    " float bias) -> ()",
    _check_foreach,
    _canonical_foreach,
    fake=lambda out, pre, ft, logits, base, bias: None,
    tags=_TABLE,
    apart=_foreach_apart,
)


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
    out, pre, ft, logits = as_lists(out=out, pre=pre, ft=ft, logits=logits)
    masks = as_masks(base, len(out))
    _check_foreach(out, pre, ft, logits, masks, bias)
    if out:
        with torch.no_grad(), Written("out", out, pre, ft, logits, masks) as targets:
            _foreach_blend_(targets, *map(dense, (pre, ft, logits, masks)), float(bias))
    return out


# -- graft_mask_step_ ----------------------------------------------------------------------------------------


def _check_step(logits, grads, pre, ft, base, bias, lr, l1, out) -> None:
    check_lists(out, pre, ft, logits, base, bias)
    check_gradients(grads, pre)
    check.number("lr", lr)
    check.number("l1", l1)


def check_gradients(grads: list[Tensor], pre: list[Tensor]) -> None:
    check_alike("grads", grads, pre, [weight.dtype for weight in pre])


def _canonical_step(logits, grads, pre, ft, base, bias, lr, l1, out) -> None:
    check_dense(logits=logits, grads=grads, pre=pre, ft=ft, base=base, out=out)


def _step_apart(logits, grads, pre, ft, base, bias, lr, l1, out) -> None:
    Spans(logits=logits, out=out).check_apart(grads, pre, ft, base)


_mask_step_ = define(
    "graft_mask_step_(Tensor(a!)[] logits, Tensor[] grads, Tensor[] pre, Tensor[] ft, Tensor[] base,"
    " float bias, float lr, float l1, Tensor(b!)[] out) -> ()",
    _check_step,
    _canonical_step,
    fake=lambda logits, grads, pre, ft, base, bias, lr, l1, out: None,
    tags=_TABLE,
    apart=_step_apart,
)


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
    out = [] if out is None else out
    logits, grads, pre, ft, out = as_lists(logits=logits, grads=grads, pre=pre, ft=ft, out=out)
    masks = as_masks(base, len(logits))
    _check_step(logits, grads, pre, ft, masks, bias, lr, l1, out)
    if logits:
        others = grads, pre, ft, masks
        with (
            torch.no_grad(),
            Written("logits", logits, out, *others) as targets,
            Written("out", out, logits, *others) as blended,
        ):
            _mask_step_(targets, *map(dense, others), float(bias), float(lr), float(l1), blended)
    return logits
