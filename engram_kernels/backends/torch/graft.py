"""Reference of grafting: the masked blend, its gradient, packed masks, top-k masks, sparse writes."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..._linalg import compute_dtype
from .. import implements


def packed_size(count: int) -> int:
    """Return the bytes of a packed mask of so many entries."""
    return (count + 7) // 8


def write_sparse(table, checked: bool, device: torch.device) -> Tensor:
    """Write what a backend's table of a sparse write holds, and return its faults; 0 if it is checked."""
    if not checked:
        return table.apply_()
    table.write_()
    return torch.zeros((), dtype=torch.int64, device=device)


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


@implements("graft_table", "torch")
class GraftTable:
    """The lists of a blend, ready for its steps."""

    def __init__(
        self, logits: list[Tensor], pre: list[Tensor], ft: list[Tensor], base: list[Tensor], out: list[Tensor]
    ):
        self._logits, self._pre, self._ft, self._out = map(_flat, (logits, pre, ft, out))
        self._base = _flat(base) if base else [None] * len(pre)
        self._gradients: list[Tensor] = []

    def blend_(self, bias: float) -> None:
        for out, *blended in zip(self._out, self._pre, self._ft, self._logits, self._base, strict=True):
            out.copy_(graft_blend(*blended, bias))

    def set_gradients(self, grads: list[Tensor]) -> None:
        self._gradients = _flat(grads)

    def step_(self, bias: float, lr: float, l1: float) -> None:
        """S ← S − lr·s·γ(1 − γ)(g (ft − pre) + l1), and θ of the new S into `out`."""
        rows = zip(self._logits, self._gradients, self._pre, self._ft, self._base, strict=True)
        for logits, gradient, pre, ft, base in rows:
            slope = logits_gradient(gradient, pre, ft, argument(logits, base, bias), l1)
            logits.sub_(_signed(slope, base), alpha=lr)
        if self._out:
            self.blend_(bias)


def _flat(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().view(-1) for tensor in tensors]


@implements("_foreach_graft_blend_", "torch")
def _foreach_graft_blend_(
    out: list[Tensor],
    pre: list[Tensor],
    ft: list[Tensor],
    logits: list[Tensor],
    base: list[Tensor],
    bias: float,
) -> None:
    GraftTable(logits, pre, ft, base, out).blend_(bias)


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
    table = GraftTable(logits, pre, ft, base, out)
    table.set_gradients(grads)
    table.step_(bias, lr, l1)


def _bits(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


@implements("pack_mask", "torch")
def pack_mask(mask: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (padded << _bits(mask)).sum(-1, dtype=torch.uint8)


@implements("unpack_mask", "torch")
def unpack_mask(packed: Tensor, count: int) -> Tensor:
    return ((packed.unsqueeze(-1) >> _bits(packed)) & 1).bool().view(-1)[:count].clone()


@implements("graft_blend_packed", "torch")
def graft_blend_packed(pre: Tensor, ft: Tensor, mask: Tensor) -> Tensor:
    return torch.where(unpack_mask(mask, pre.numel()), ft, pre)


@implements("top_k_table", "torch")
class TopKTable:
    """Scores, and room for the masks of the k largest."""

    def __init__(self, scores: list[Tensor], reference: list[Tensor]):
        self._scores, self._reference = _flat(scores), _flat(reference)
        self.masks = [score.new_empty(packed_size(score.numel()), dtype=torch.uint8) for score in scores]
        self.invalid = torch.zeros((), dtype=torch.int64, device=scores[0].device)

    def _keys(self, i: int) -> Tensor:
        wide = self._scores[i].to(compute_dtype(self._scores[i]))
        return (wide - self._reference[i].to(wide.dtype)).abs_() if self._reference else wide

    def select_(self, k: int) -> None:
        """Find the k-th largest key among each tensor's k largest; then of its equals the first ones."""
        self.invalid.zero_()
        candidates = []
        for i, tensor in enumerate(self._scores):
            key = self._keys(i)
            self.invalid += (~key.isfinite()).sum()
            candidates.append(key.topk(min(k, tensor.numel())).values)
        if k == 0:
            for mask in self.masks:
                mask.zero_()
            return
        chosen = torch.cat(candidates).topk(k).values
        threshold = chosen[-1]
        ties = (chosen == threshold).sum()
        for i, mask in enumerate(self.masks):
            key = self._keys(i)
            equal = key == threshold
            mask.copy_(pack_mask((key > threshold) | (equal & (equal.cumsum(0) <= ties))))
            ties = (ties - equal.sum()).clamp_min(0)


@implements("top_k_mask", "torch")
def top_k_mask(scores: list[Tensor], reference: list[Tensor], k: int) -> tuple[list[Tensor], Tensor]:
    table = TopKTable(scores, reference)
    table.select_(k)
    return table.masks, table.invalid


@implements("sparse_faults", "torch")
def sparse_faults(weights: list[Tensor], indices: list[Tensor]) -> Tensor:
    faults = torch.zeros((), dtype=torch.int64, device=weights[0].device)
    for weight, index in zip(weights, _flat(indices), strict=True):
        bad = (index < 0) | (index >= weight.numel())
        bad[1:] |= index[1:] <= index[:-1]
        faults += bad.sum()
    return faults


@implements("sparse_table", "torch")
class SparseTable:
    """The lists of a sparse write, ready for as many as there are."""

    def __init__(
        self, weights: list[Tensor], indices: list[Tensor], values: list[Tensor], overwritten: list[Tensor]
    ):
        self._weights, self._indices = _flat(weights), _flat(indices)
        self._values, self._overwritten = _flat(values), _flat(overwritten)

    def apply_(self) -> Tensor:
        """Where there are faults each entry gets what it has, so that nothing need be waited for."""
        faults = sparse_faults(self._weights, self._indices)
        for weight, index, value, overwritten in self._rows():
            index = index.long().clamp(0, max(0, weight.numel() - 1))
            before = weight[index]
            weight[index] = torch.where(faults == 0, value, before)
            overwritten.copy_(before)
        return faults

    def write_(self) -> None:
        for weight, index, value, overwritten in self._rows():
            index = index.long()
            before = weight[index]
            weight[index] = value
            overwritten.copy_(before)

    def _rows(self) -> Iterator[tuple[Tensor, ...]]:
        return zip(self._weights, self._indices, self._values, self._overwritten, strict=True)


@implements("sparse_apply_", "torch")
def sparse_apply_(
    weights: list[Tensor],
    indices: list[Tensor],
    values: list[Tensor],
    overwritten: list[Tensor],
    checked: bool,
) -> Tensor:
    return write_sparse(SparseTable(weights, indices, values, overwritten), checked, weights[0].device)
