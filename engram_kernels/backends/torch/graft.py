"""Reference of grafting: the masked blend, its gradient, packed masks, top-k masks, sparse writes."""

import torch
from torch import Tensor

from ..._linalg import compute_dtype
from .. import implements

_BITS = torch.arange(8, dtype=torch.uint8)


def packed_size(count: int) -> int:
    """Return the bytes of a packed mask of so many entries."""
    return (count + 7) // 8


def argument(logits: Tensor, base: Tensor | None, bias: float) -> Tensor:
    """x = s·(S − bias), s = −1 where the base mask's bit is 1, else +1; the gate is γ = σ(x)."""
    x = logits - bias
    return x if base is None else torch.where(unpack_mask(base, x.numel()), -x, x)


def blend(pre: Tensor, ft: Tensor, x: Tensor) -> Tensor:
    """θ = pre + γ (ft − pre), from the nearer end: a gate of 0 or 1 gives pre or ft exactly."""
    near, far = torch.where(x < 0, pre, ft).to(x.dtype), torch.where(x < 0, ft, pre).to(x.dtype)
    return (near + torch.sigmoid(-x.abs()) * (far - near)).to(pre.dtype)


def logits_gradient(gradient: Tensor, pre: Tensor, ft: Tensor, x: Tensor, l1: float = 0.0) -> Tensor:
    """γ(1 − γ) (g (ft − pre) + l1): the gradient for S where s = 1, its negative where s = −1."""
    small = torch.sigmoid(-x.abs())
    return small * (1 - small) * (gradient.to(x.dtype) * (ft.to(x.dtype) - pre.to(x.dtype)) + l1)


def _signed(gradient: Tensor, base: Tensor | None) -> Tensor:
    return gradient if base is None else torch.where(unpack_mask(base, gradient.numel()), -gradient, gradient)


@implements("graft_blend", "torch")
def graft_blend(pre: Tensor, ft: Tensor, logits: Tensor, base: Tensor | None, bias: float) -> Tensor:
    return blend(pre, ft, argument(logits, base, bias))


@implements("graft_logits_gradient", "torch")
def graft_logits_gradient(
    gradient: Tensor, pre: Tensor, ft: Tensor, logits: Tensor, base: Tensor | None, bias: float
) -> Tensor:
    return _signed(logits_gradient(gradient, pre, ft, argument(logits, base, bias)), base)


@implements("_foreach_graft_blend_", "torch")
def _foreach_graft_blend_(
    out: list[Tensor],
    pre: list[Tensor],
    ft: list[Tensor],
    logits: list[Tensor],
    base: list[Tensor],
    bias: float,
) -> None:
    for i, target in enumerate(out):
        target.copy_(graft_blend(pre[i], ft[i], logits[i], base[i] if base else None, bias))


@implements("graft_mask_step_", "torch")
def graft_mask_step_(
    logits: list[Tensor],
    grads: list[Tensor],
    pre: list[Tensor],
    ft: list[Tensor],
    base: list[Tensor],
    bias: float,
    lr: float,
    l1: float,
    out: list[Tensor],
) -> None:
    """S ← S − lr·s·γ(1 − γ)(g (ft − pre) + l1), and θ of the new S into `out`."""
    for i, target in enumerate(logits):
        mask = base[i] if base else None
        x = argument(target, mask, bias)
        target.sub_(_signed(logits_gradient(grads[i], pre[i], ft[i], x, l1), mask), alpha=lr)
    if out:
        _foreach_graft_blend_(out, pre, ft, logits, base, bias)


@implements("pack_mask", "torch")
def pack_mask(mask: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (padded << _BITS.to(mask.device)).sum(-1, dtype=torch.uint8)


@implements("unpack_mask", "torch")
def unpack_mask(packed: Tensor, count: int) -> Tensor:
    return ((packed.unsqueeze(-1) >> _BITS.to(packed.device)) & 1).bool().view(-1)[:count].clone()


@implements("graft_blend_packed", "torch")
def graft_blend_packed(pre: Tensor, ft: Tensor, mask: Tensor) -> Tensor:
    return torch.where(unpack_mask(mask, pre.numel()), ft, pre)


@implements("top_k_mask", "torch")
def top_k_mask(scores: list[Tensor], reference: list[Tensor], k: int) -> tuple[list[Tensor], Tensor]:
    """Find the k-th largest key among each tensor's k largest; then of its equals the first ones."""

    def keys(i: int) -> Tensor:
        wide = scores[i].to(compute_dtype(scores[i]))
        return (wide - reference[i].to(wide.dtype)).abs_() if reference else wide

    invalid, candidates = torch.zeros((), dtype=torch.int64, device=scores[0].device), []
    for i, tensor in enumerate(scores):
        key = keys(i)
        invalid += (~key.isfinite()).sum()
        candidates.append(key.topk(min(k, tensor.numel())).values)
    if k == 0:
        return [pack_mask(torch.zeros_like(tensor, dtype=torch.bool)) for tensor in scores], invalid
    chosen = torch.cat(candidates).topk(k).values
    threshold = chosen[-1]
    ties = int((chosen == threshold).sum())
    masks = []
    for i in range(len(scores)):
        key = keys(i)
        equal = key == threshold
        rank = equal.cumsum(0)
        masks.append(pack_mask((key > threshold) | (equal & (rank <= ties))))
        ties -= min(ties, int(rank[-1]) if rank.numel() else 0)
    return masks, invalid


@implements("sparse_faults", "torch")
def sparse_faults(weights: list[Tensor], indices: list[Tensor]) -> Tensor:
    faults = torch.zeros((), dtype=torch.int64, device=weights[0].device)
    for weight, index in zip(weights, indices, strict=True):
        bad = (index < 0) | (index >= weight.numel())
        bad[1:] |= index[1:] <= index[:-1]
        faults += bad.sum()
    return faults


@implements("sparse_apply_", "torch")
def sparse_apply_(
    weights: list[Tensor], indices: list[Tensor], values: list[Tensor], overwritten: list[Tensor]
) -> None:
    for weight, index, value, old in zip(weights, indices, values, overwritten, strict=True):
        index = index.long()
        old.copy_(weight[index])
        weight[index] = value
