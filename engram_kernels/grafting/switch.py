"""Several grafts that take turns in one model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .. import _checks as check
from .applied import AppliedGraft, warning_after
from .graft import Graft


class GraftSwitch:
    """Several grafts that take turns in one resident model; a change is two sparse writes.

    The base is checked once, when the switch is made, and every graft's tensors are kept on the model's
    devices. Move or convert the model before, not after.

    Args:
        model: the base, with no graft in it.
        grafts: by name; at least one.
        force: as for `Graft.apply`.

    Attributes:
        active: the name of the graft that is in the model, or None.

    Raises:
        TypeError, ValueError: an argument that cannot be used.
        EngramError: as `Graft.apply`.

    Example:
        >>> switch = GraftSwitch(model, {"sentiment": first, "questions": second})
        >>> switch.use("sentiment")
        >>> switch.use("questions")
        >>> switch.use(None)  # the base again, bit for bit
    """

    def __init__(self, model: nn.Module, grafts: Mapping[str, Graft], force: bool = False):
        check.expect(
            isinstance(grafts, Mapping), "grafts", "a mapping of names", type(grafts).__name__, TypeError
        )
        check.expect(len(grafts) > 0, "grafts", "at least one", "none")
        for name, graft in grafts.items():
            check.expect(isinstance(name, str), "grafts", "names that are texts", repr(name), TypeError)
            check.expect(
                isinstance(graft, Graft), "grafts", f"a Graft at {name!r}", type(graft).__name__, TypeError
            )
        known: dict[str, str] = {}
        self._grafts = {name: AppliedGraft(model, graft, force, known) for name, graft in grafts.items()}
        self.active: str | None = None

    def use(self, name: str | None) -> None:
        """Have the graft of that name in the model, or none.

        Raises:
            ValueError: there is no graft of that name.
            EngramError: the active graft's weights were changed since; the model is unchanged.
        """
        if name is not None and name not in self._grafts:
            raise ValueError(f"name: expected one of {', '.join(self._grafts)}, or None, got {name!r}")
        if name == self.active:
            return
        if self.active is not None:
            self._grafts[self.active].revert()
            self.active = None
        if name is not None:
            self._grafts[name].write()
        self.active = name

    def __enter__(self) -> GraftSwitch:
        return self

    def __exit__(self, kind, _exception, _traceback) -> None:
        with warning_after(kind):
            self.use(None)

    def __repr__(self) -> str:
        return f"GraftSwitch({', '.join(self._grafts)}; active: {self.active})"
