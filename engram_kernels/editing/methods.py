"""The published methods of editing, as settings of one algorithm."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from .. import _checks as check
from .values import ValueOptions

CONFLICTS = ("refuse", "last")
FAILURES = ("raise", "skip")


@dataclass(frozen=True)
class Method:
    """The settings in which the methods differ.

    Attributes:
        layers: over how many layers a change is spread.
        batch: how many edits are written at once; None: all of them.
        ridge: `λ`, how much of a change is given up for a smaller write; 0 writes it exactly.
        null_space: eigenvalues of `C` up to this share of their mean count as none, and writes stay in their
            span; None: writes are whitened by `C`.
        preserve: whether earlier batches are held.
        key_ridge: `λ` of the key that all texts answer to alike (`SpreadKey`); None: the mean key.
        texts: about how many texts a value is searched over; None: every prompt after every context.
        value: options of the value's optimisation, where the caller gives none.
    """

    layers: int = 1
    batch: int | None = None
    ridge: float = 0.0
    null_space: float | None = None
    preserve: bool = False
    key_ridge: float | None = None
    texts: int | None = None
    value: ValueOptions = field(default_factory=ValueOptions)


METHODS = {
    # This package's own: ROME under a key that every text of the edit answers to.
    "engram": Method(
        batch=1,
        key_ridge=10.0,
        texts=8,
        value=ValueOptions(learning_rate=0.8, stop_probability=0.9, relative=True),
    ),
    # Meng et al. 2022, arXiv 2202.05262.
    "rome": Method(batch=1),
    # Gupta et al. 2024, arXiv 2403.14236.
    "emmet": Method(),
    # Meng et al. 2023, arXiv 2210.07229.
    "memit": Method(layers=5, ridge=20.0),
    # Fang et al. 2024, arXiv 2410.02355.
    "alphaedit": Method(layers=5, batch=100, ridge=10.0, null_space=0.02, preserve=True),
}


def check_method(method: object) -> None:
    """Raise ValueError where there is no such method."""
    _check_name("method", method, METHODS)


def check_choices(method: object, batch: object, conflicts: object, failures: object) -> None:
    """Check the arguments that can be checked without a model.

    Raises:
        TypeError: `batch` is not an integer.
        ValueError: a name is unknown, or `batch` is not positive.
    """
    check_method(method)
    _check_name("conflicts", conflicts, CONFLICTS)
    _check_name("failures", failures, FAILURES)
    if batch is not None:
        check.integer("batch", batch)
        check.expect(batch > 0, "batch", "a positive number or None", batch)


def _check_name(name: str, value: object, known: Collection[str]) -> None:
    expected = f"one of {', '.join(map(repr, known))}"
    check.expect(isinstance(value, str) and value in known, name, expected, repr(value))
