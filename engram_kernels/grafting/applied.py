"""A graft that stands in a model, and several that take turns in one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .._hashing import tensor_checksum
from ..errors import EngramError
from ..ops import sparse_apply_
from .parameters import tensors_of

if TYPE_CHECKING:
    from .graft import Graft


class AppliedGraft:
    """A graft in a model, and the values that it overwrote.

    As a context manager it takes the graft back at the end of the block.
    """

    def __init__(self, graft: Graft, model: nn.Module, force: bool = False):
        self._patch: _Patch | None = _Patch(graft, model, force)
        self._patch.exchange()

    @property
    def applied(self) -> bool:
        """Whether the graft still stands in the model."""
        return self._patch is not None

    def revert(self, force: bool = False) -> None:
        """Put the overwritten values back, bit for bit. Nothing happens where nothing is applied.

        Args:
            force: put them back even if the grafted weights were changed since.

        Raises:
            EngramError: they were changed since, by a later graft for instance, and `force` is False; the
                model is unchanged.
        """
        if self._patch is None:
            return
        self._patch.withdraw(force)
        self._patch = None

    def __enter__(self) -> AppliedGraft:
        return self

    def __exit__(self, kind, _exception, _traceback) -> None:
        with _quiet_after(kind):
            self.revert()


class GraftSwitch:
    """Several grafts that take turns in one resident model; a change is two sparse writes.

    The base is checked once, when the switch is made; every graft's tensors lie ready on the model's devices.
    Move or convert the model before, not after.

    Args:
        model: the base, with no graft in it.
        grafts: by name.
        force: as for `Graft.apply`.

    Example:
        >>> switch = GraftSwitch(model, {"sentiment": first, "questions": second})
        >>> switch.use("sentiment")
        >>> switch.use("questions")
        >>> switch.use(None)  # the base again, bit for bit
    """

    def __init__(self, model: nn.Module, grafts: Mapping[str, Graft], force: bool = False):
        checksums: dict[str, str] = {}
        self._patches = {name: _Patch(graft, model, force, checksums) for name, graft in grafts.items()}
        self.active: str | None = None

    def use(self, name: str | None) -> None:
        """Let the graft of that name stand in the model, or none.

        Raises:
            ValueError: there is no graft of that name.
            EngramError: the active graft's weights were changed since; the model is unchanged.
        """
        if name is not None and name not in self._patches:
            raise ValueError(f"name: expected one of {', '.join(self._patches)}, or None, got {name!r}")
        if name == self.active:
            return
        if self.active is not None:
            self._patches[self.active].withdraw()
            self.active = None
        if name is not None:
            self._patches[name].exchange()
        self.active = name

    def __enter__(self) -> GraftSwitch:
        return self

    def __exit__(self, kind, _exception, _traceback) -> None:
        with _quiet_after(kind):
            self.use(None)


@contextmanager
def _quiet_after(kind: type[BaseException] | None) -> Iterator[None]:
    """Where an exception is in flight it says more than its consequence here, which becomes a warning."""
    try:
        yield
    except EngramError as error:
        if kind is None:
            raise
        warnings.warn(f"the graft stays in the model: {error}", stacklevel=4)


class _Group(NamedTuple):
    """What a patch writes on one device: a model may be spread over several."""

    names: list[str]
    weights: list[Tensor]
    indices: list[Tensor]
    values: list[Tensor]

    def exchanged(self) -> _Group:
        return self._replace(values=sparse_apply_(self.weights, self.indices, self.values))


class _Patch:
    """A graft's positions in one model. `exchange` swaps the values there with those kept."""

    def __init__(self, graft: Graft, model: nn.Module, force: bool, checksums: dict[str, str] | None = None):
        checksums = {} if checksums is None else checksums  # of the model's tensors that are known already
        names = list(graft.indices)
        weights = tensors_of(model, list(graft.shapes) if not force else names, "model")
        for name, weight in weights.items():
            if tuple(weight.shape) != tuple(graft.shapes[name]):
                raise EngramError(
                    f"model: expected shape {list(graft.shapes[name])} in {name!r}, got {list(weight.shape)}"
                )
            if not weight.is_floating_point() or weight.is_meta:
                raise EngramError(f"model: expected floating-point weights in memory in {name!r}, got others")
            if force:
                continue
            if name not in checksums:
                checksums[name] = tensor_checksum(weight)
            if checksums[name] != graft.checksums[name]:
                raise EngramError(
                    f"model: expected in {name!r} the weights that the graft was made for, got others "
                    "(force=True grafts them all the same)"
                )
        self._model = model
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
        self._written = [group.values for group in self._groups]

    def exchange(self) -> None:
        """Swap; all of it or nothing."""
        self._check_memory()
        done: list[_Group] = []
        try:
            for group in self._groups:
                done.append(group.exchanged())
        except BaseException:
            for group in done:
                group.exchanged()
            raise
        self._groups = done
        # A caller's autocast keeps copies of the weights in its own dtype, and does not see this write.
        torch.clear_autocast_cache()

    def withdraw(self, force: bool = False) -> None:
        """Exchange back; where what comes out is not what was written, undo that and raise."""
        self.exchange()
        same = all(
            _bits(value).equal(_bits(expected))
            for group, written in zip(self._groups, self._written, strict=True)
            for value, expected in zip(group.values, written, strict=True)
        )
        if not same and not force:
            self.exchange()
            raise EngramError(
                "model: expected the grafted weights as the graft left them, got them changed since: "
                "revert later grafts first, or give force=True"
            )

    def _check_memory(self) -> None:
        """The model's tensors must be those that are written to: moving a model gives it others."""
        for group in self._groups:
            now = tensors_of(self._model, group.names, "model")
            for name, weight in zip(group.names, group.weights, strict=True):
                if now[name].data_ptr() != weight.data_ptr() or now[name].dtype != weight.dtype:
                    raise EngramError(
                        f"model: expected in {name!r} the tensor that the graft was applied to, got another "
                        "one: the model was moved, converted or loaded anew; do that with no graft in it"
                    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)
