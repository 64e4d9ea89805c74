"""Sparse values in a model's weights, and the way back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import _checks as check
from .._hashing import tensor_checksum
from ..errors import EngramError
from ..hf.placement import divide_again, is_sharded, keep_part_, local, whole
from ..hf.projection import is_plain
from ..ops import SparsePlan, sparse_apply_
from ..ops.waiting import raises_at_once
from .parameters import tensors_of


class Delta(Protocol):
    """What can be written: `weight[indices] = values`, by name, and the base's shapes and checksums."""

    indices: dict[str, Tensor]
    values: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    checksums: dict[str, str]


class AppliedGraft:
    """A graft in a model, with the values that it overwrote. `Graft.apply` makes it.

    As a context manager it reverts the graft at the end of the block.

    Attributes:
        applied: whether the graft is in the model now.

    Example:
        >>> applied = graft.apply(model)
        >>> applied.revert()  # bit for bit
    """

    def __init__(
        self, model: nn.Module, graft: Delta, force: bool = False, known: dict[str, str] | None = None
    ):
        """Check the model and bring the values to its devices; `write` writes them.

        Args:
            model: the base.
            graft: what to write.
            force: whether the base may have other weights.
            known: checksums of the model's tensors, by name, that need not be computed; new ones are added.
        """
        check.expect(isinstance(model, nn.Module), "model", "a module", type(model).__name__, TypeError)
        self.applied = False
        self._model = model
        divide_again(model)
        names = list(graft.indices)
        weights = tensors_of(model, names if force else list(graft.shapes), "model")
        _check_base(weights, graft, None if force else known if known is not None else {})
        self._groups: list[_Group] = []
        for device in dict.fromkeys(weights[name].device for name in names):
            mine = [name for name in names if weights[name].device == device]
            wide = any(graft.indices[name].dtype == torch.int64 for name in mine)
            index = torch.int64 if wide else torch.int32
            self._groups.append(
                _Group(
                    mine,
                    [weights[name] for name in mine],
                    [graft.indices[name].to(device, index) for name in mine],
                    [graft.values[name].to(device, weights[name].dtype) for name in mine],
                )
            )
        self._written = [[value.clone() for value in group.values] for group in self._groups]

    def write(self) -> None:
        """Write the values, all or none. Nothing happens where they are in the model already.

        Raises:
            EngramError: the model was moved or converted since.
        """
        if not self.applied:
            self._exchange()
            self.applied = True

    def revert(self, force: bool = False) -> None:
        """Put the overwritten values back, bit for bit. Nothing happens where nothing is applied.

        Args:
            force: put them back even if the grafted weights were changed since.

        Raises:
            EngramError: they were changed since, by a later graft for instance, and `force` is False; the
                model is unchanged.
        """
        if not self.applied:
            return
        self._exchange()
        as_written = all(
            value.view(torch.uint8).equal(expected.view(torch.uint8))
            for group, written in zip(self._groups, self._written, strict=True)
            for value, expected in zip(group.values, written, strict=True)
        )
        if not as_written and not force:
            self._exchange()
            raise EngramError(
                "model: expected the grafted weights as the graft left them, got them changed since: "
                "revert later grafts first, or give force=True"
            )
        if not as_written:
            # Values that were changed since are not the graft's.
            for group, written in zip(self._groups, self._written, strict=True):
                group.set_values(written)
        self.applied = False

    def __enter__(self) -> AppliedGraft:
        return self

    def __exit__(self, kind, _exception, _traceback) -> None:
        with warning_after(kind):
            self.revert()

    def __repr__(self) -> str:
        entries = sum(at.numel() for group in self._groups for at in group.indices)
        state = "applied" if self.applied else "reverted"
        return f"AppliedGraft({entries:,} weights of a {type(self._model).__name__}, {state})"

    def _exchange(self) -> None:
        """Swap the values at the graft's positions with those kept; all of them or none."""
        self._check_memory()
        done: list[_Group] = []
        try:
            for group in self._groups:
                group.exchange()
                done.append(group)
        except BaseException:
            for group in done:
                group.exchange()
            raise
        # A caller's autocast keeps copies of the weights in its own dtype, and does not see this write.
        torch.clear_autocast_cache()

    def _check_memory(self) -> None:
        """The model's tensors must be those that are written to: moving a model gives it others."""
        divide_again(self._model)
        for group in self._groups:
            now = tensors_of(self._model, group.names, "model")
            for name, weight in zip(group.names, group.weights, strict=True):
                if local(now[name]).data_ptr() != local(weight).data_ptr() or now[name].dtype != weight.dtype:
                    raise EngramError(
                        f"model: expected in {name!r} the tensor that the graft was applied to, got another "
                        "one: the model was moved, converted or loaded anew; do that with no graft in it"
                    )


class _Group:
    """What is written on one device: a model may be spread over several."""

    def __init__(self, names: list[str], weights: list[Tensor], indices: list[Tensor], values: list[Tensor]):
        self.names, self.weights, self.indices = names, weights, indices
        self.plan = None
        if not any(is_sharded(weight) or not weight.is_contiguous() for weight in weights):
            self.plan = SparsePlan(weights, indices, values)
        self.values = values if self.plan is None else self.plan.values

    @raises_at_once
    def exchange(self) -> None:
        """Swap the weights' entries with the values."""
        if self.plan is not None:
            self.plan.swap_()
            return
        # One whole tensor at a time, of which each rank keeps its part.
        before = []
        for weight, at, values in zip(self.weights, self.indices, self.values, strict=True):
            full = whole(weight)
            before += sparse_apply_([full], [at], [values])
            if is_sharded(weight):
                keep_part_(weight, full)
        self.values = before

    def set_values(self, values: list[Tensor]) -> None:
        """Take what the next exchange writes."""
        self.values = [kept.copy_(value) for kept, value in zip(self.values, values, strict=True)]


def _check_base(weights: Mapping[str, Tensor], graft: Delta, known: dict[str, str] | None) -> None:
    """Make sure of the weights' shapes and, unless `known` is None, of their checksums."""
    for name, weight in weights.items():
        if tuple(weight.shape) != tuple(graft.shapes[name]):
            raise EngramError(
                f"model: expected shape {list(graft.shapes[name])} in {name!r}, got {list(weight.shape)}"
            )
        if not weight.is_floating_point() or weight.is_meta:
            raise EngramError(f"model: expected floating-point weights in memory in {name!r}, got others")
        if not (is_plain(weight) or is_sharded(weight)):
            raise EngramError(f"model: expected plain weights, got {type(weight).__name__} in {name!r}")
        if known is None:
            continue
        if name not in known:
            known[name] = tensor_checksum(whole(weight))
        if known[name] != graft.checksums[name]:
            raise EngramError(
                f"model: expected in {name!r} the weights that the graft was made for, got others "
                "(force=True grafts them all the same)"
            )


@contextmanager
def warning_after(kind: type[BaseException] | None) -> Iterator[None]:
    """Where an exception is in flight it says more than its consequence here, which becomes a warning."""
    try:
        yield
    except EngramError as error:
        if kind is None:
            raise
        warnings.warn(f"the graft stays in the model: {error}", stacklevel=4)
