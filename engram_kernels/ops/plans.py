"""Plans: lists of tensors that are checked once, made ready once, and then worked on again and again.

A plan keeps its tensors and, on a GPU, a table of their addresses. Work on it checks nothing that was
checked, allocates nothing, copies nothing to the device and waits for nothing, so that a CUDA graph can
capture it. Whoever gives one of its tensors other memory (`tensor.data = …`, a move to another device) makes
a new plan.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks as check
from ..backends import select
from .graft import check_gradients, check_lists
from .graft_masks import check_top_k, top_k_results
from .graft_sparse import check_positions, check_sparse, one_index_type, room_for, sparse_faults
from .lists import Spans, as_lists, as_masks, check_count, check_dense, dense
from .waiting import later, mode_for

__all__ = ["GraftPlan", "SparsePlan", "TopKPlan"]


def _written(*lists: list[Tensor]) -> list[Tensor]:
    """The tensors whose versions autograd counts."""
    return [tensor for tensors in lists for tensor in tensors if not tensor.is_inference()]


def _table(name: str, *lists: list[Tensor]):
    """What a backend makes of lists, to be worked on; None of empty lists."""
    return select(name, lists[0][0].device.type, lists).function(*lists) if lists[0] else None


def _brief(plan: object, tensors: list[Tensor]) -> str:
    entries = sum(tensor.numel() for tensor in tensors)
    return f"{type(plan).__name__}({entries:,} entries in {len(tensors)} tensors)"


class GraftPlan:
    """A mask over the weights of a whole model, ready for its steps: `graft_mask_step_` again and again.

    Args:
        logits: S, tensors of any shapes, fp32 (fp64 for fp64 weights), contiguous, changed by `step_`.
        pre, ft: tensors of the same shapes; strided ones are copied, once.
        base: packed bit masks. Default: no bit is set.
        bias: subtracted from S.
        out: where θ is written, contiguous, apart from all others in memory. Default: nowhere.

    Attributes:
        logits, out: the tensors that are written.

    Raises:
        ValueError: wrong shape, device, number of tensors or bias; strided logits or out; memory that is
            written twice, or written and read.
        TypeError: wrong dtype.

    Example:
        >>> plan = ek.GraftPlan(logits, pre, ft, base, bias=10.0, out=parameters)
        >>> plan.blend_()
        >>> for batch in batches:
        ...     loss_of(model, batch).backward()
        ...     plan.step_([p.grad for p in parameters], lr=0.1)

    Source: Panigrahi et al. 2023 (arXiv 2302.06600), section 2.
    """

    def __init__(
        self,
        logits: Sequence[Tensor],
        pre: Sequence[Tensor],
        ft: Sequence[Tensor],
        base: Sequence[Tensor] | None = None,
        bias: float = 0.0,
        out: Sequence[Tensor] | None = None,
    ):
        out = [] if out is None else out
        self.logits, self._pre, self._ft, self.out = as_lists(logits=logits, pre=pre, ft=ft, out=out)
        masks = as_masks(base, len(self.logits))
        check_lists(self.out, self._pre, self._ft, self.logits, masks, bias)
        check_dense(logits=self.logits, out=self.out)
        self.bias = float(bias)
        self._read = dense(self._pre), dense(self._ft), dense(masks)
        self._spans = Spans(logits=self.logits, out=self.out)
        self._spans.check_apart(*self._read)
        self._table = _table("graft_table", self.logits, *self._read, self.out)
        self._blended, self._stepped = _written(self.out), _written(self.logits, self.out)
        self._kinds = [(weight.dtype, weight.shape, weight.device) for weight in self._pre]
        self._sizes = [weight.nbytes for weight in self._pre]
        # A plan keeps no gradient alive: they are the largest tensors that come and go.
        self._grads: list[weakref.ref[Tensor]] = []
        self._places: list[int] = []

    @torch.no_grad()
    def blend_(self) -> list[Tensor]:
        """Write θ of the present logits into `out`, as `_foreach_graft_blend_`, and return it.

        Raises:
            ValueError: the plan has no `out`.
        """
        check.expect(bool(self.out or not self.logits), "out", "tensors to write θ to", "a plan without")
        if self._table is not None:
            self._table.blend_(self.bias)
            torch.autograd.graph.increment_version(self._blended)
        return self.out

    @torch.no_grad()
    def step_(self, grads: Sequence[Tensor], lr: float = 1.0, l1: float = 0.0) -> list[Tensor]:
        """Take one gradient step on the logits, and write the next θ into `out`, as `graft_mask_step_`.

        Args:
            grads: `∂loss/∂θ`, tensors of pre's shapes and dtypes. The same tensors as before cost nothing;
                the addresses of others are sent to the device, which a CUDA graph does not capture.
            lr: the learning rate.
            l1: the weight of the sum of all gates.

        Returns:
            The logits.

        Raises:
            ValueError: wrong shape, device, number of tensors, lr or l1; nothing is changed.
            TypeError: wrong dtype.
            EngramError: other gradients than before while a CUDA graph is captured.
        """
        check.number("lr", lr)
        check.number("l1", l1)
        places = [gradient.data_ptr() for gradient in grads] if self._same(grads) else None
        if places is None or places != self._places:
            (given,) = as_lists(grads=grads)
            kinds = [(gradient.dtype, gradient.shape, gradient.device) for gradient in given]
            if kinds != self._kinds:
                check_gradients(given, self._pre)
            read = dense(given)
            places = [gradient.data_ptr() for gradient in read]
            if self._spans.meet(places, self._sizes):
                self._spans.check_apart(read)
            if self._table is not None:
                self._table.set_gradients(read)
            # What was copied is another tensor at the next step.
            self._grads = list(map(weakref.ref, given)) if read is given else []
            self._places = places
        if self._table is not None:
            self._table.step_(self.bias, float(lr), float(l1))
            torch.autograd.graph.increment_version(self._stepped)
        return self.logits

    def _same(self, grads: Sequence[Tensor]) -> bool:
        known = self._grads
        return len(grads) == len(known) and all([x is y() for x, y in zip(grads, known, strict=True)])

    def __repr__(self) -> str:
        return _brief(self, self.logits)


class SparsePlan:
    """Positions of many tensors, and values that change places with what lies there: apply, undo, apply.

    Args:
        weights: tensors of any shapes and floating types, all on one device, contiguous.
        indices: [n] each, int32 or int64; in any order, fastest in ascending order.
        values: [n] each, of the weight's dtype; copied.

    Attributes:
        weights: the tensors that are written.
        values: what the next `swap_` writes. To write other values to the same positions, change these:
            `torch._foreach_copy_(plan.values, values)`.

    Raises:
        ValueError: an index out of range or given twice, wrong shape, device or number of tensors, strided
            weights, or memory that is written twice.
        TypeError: wrong dtype.

    Example:
        >>> plan = ek.SparsePlan(weights, graft.indices, graft.values)
        >>> plan.swap_()  # the graft is in the weights, what it overwrote in plan.values
        >>> plan.swap_()  # and back, bit for bit
    """

    def __init__(self, weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]):
        self.weights, at, values = as_lists(weights=weights, indices=indices, values=values)
        check_sparse(self.weights, at, values)
        check_dense(weights=self.weights)
        Spans(weights=self.weights)
        self.values = room_for(values) if values else []
        for kept, value in zip(self.values, values, strict=True):
            kept.copy_(value.detach())
        self._indices = one_index_type(at) if at else []
        with torch.no_grad():
            if self.weights and int(sparse_faults(self.weights, self._indices)):
                check_positions(self.weights, self._indices)
        self._table = _table("sparse_table", self.weights, self._indices, self.values, self.values)
        self._swapped = _written(self.weights, self.values)

    @torch.no_grad()
    def swap_(self) -> list[Tensor]:
        """Exchange the weights' entries with `values`, bit for bit, and return `values`."""
        if self._table is not None:
            self._table.write_()
            torch.autograd.graph.increment_version(self._swapped)
        return self.values

    def __repr__(self) -> str:
        return _brief(self, self.values)


class TopKPlan:
    """The masks of the k largest scores of many tensors, to be taken again after the scores have changed.

    Args:
        scores: tensors of any shapes, all on one device, contiguous; fp64 not mixed with other types.
        k: the number of entries, 0 to the number of all.
        reference: tensors of the same shapes and dtypes: then the k largest `|scores − reference|`.

    Attributes:
        masks: packed masks, as the last `select_` left them.

    Raises:
        ValueError: wrong shape, device or k, or strided tensors.
        TypeError: wrong dtype.

    Example:
        >>> plan = ek.TopKPlan(scores, k=1000)
        >>> masks = plan.select_()
    """

    def __init__(self, scores: Sequence[Tensor], k: int, reference: Sequence[Tensor] | None = None):
        reference = [] if reference is None else reference
        self._scores, self._reference = as_lists(scores=scores, reference=reference)
        if self._reference:
            check_count("reference", self._reference, self._scores)
        check_top_k(self._scores, self._reference, k)
        check_dense(scores=self._scores, reference=self._reference)
        self._k = k
        self._table = _table("top_k_table", self._scores, self._reference)
        self.masks: list[Tensor] = self._table.masks if self._table else []

    @torch.no_grad()
    def select_(self) -> list[Tensor]:
        """Choose by the present scores, write the masks, and return them, as `top_k_mask`.

        Raises:
            ValueError: a score that is NaN or infinite.
        """
        if self._table is not None:
            self._table.select_(self._k)
            mode = mode_for(self._scores[0].device.type)
            if mode == "sync":
                top_k_results((self.masks, self._table.invalid), self._scores, self._reference, self._k)
            elif mode == "async":
                # The next choice writes there again.
                later(self._table.invalid.clone(), "TopKPlan: expected finite scores, got NaN or infinite")
        return self.masks

    def __repr__(self) -> str:
        return _brief(self, self._scores)
