"""The published methods of editing, as settings of one algorithm."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from .. import _checks as check
from ..hf.projection import DEFAULT_DEPTH
from .search.gradients import GradientOptions
from .search.values import ValueOptions

CONFLICTS = ("refuse", "last")
FAILURES = ("raise", "skip")
VALUES = ("search", "gradient", "warm")


@dataclass(frozen=True)
class Method:
    """A closed-form editor, as settings of one write: `ΔW = Eᵀ (λI + K Q Kᵀ)⁻¹ K Q R` (`ek.Preconditioner`).

    `Q = (wC + μI + ω Σ KₚᵀKₚ)⁻¹`, with a sum over the keys of earlier batches, and within a null space or
    some neurons where a method has them.

    Attributes:
        layers: over how many layers a change is spread.
        depth: around which share of the model's depth these lie.
        batch: how many edits are written at once; None: all of them.
        ridge: `λ`, how much of a change is given up for a smaller write; 0 writes it exactly.
        moment: `w`, the weight of the statistics `C` in `Q`.
        identity: `μ`, the weight of the identity.
        null_space: eigenvalues of `C` up to this share of their mean count as none, and writes stay in their
            span; None: in every direction.
        renew: after how many edits that span is sought anew, with the keys written so far; None: never.
        neurons: writes stay in the columns of the fewest neurons that have this share of the keys' magnitude;
            None: in all.
        preserve: `ω`, how much an earlier key weighs; True: `1/λ`, or 1 without a ridge; `math.inf`: its
            answer stays exactly.
        suppress: `(β, α)`: `R` takes α of an update away along the principal directions of the weight's rows,
            those that hold the share β of its energy; None: `R = I`.
        ideal: λ of SimIE around the method: its writes are pulled to what one write of all edits would be;
            None: not.
        key_ridge: `λ` of the key that all texts answer to alike (`SpreadKey`); None: the mean key.
        texts: about how many texts a value is searched over; None: every prompt after every context.
        forms: a value is also searched over its prompt in a question, a list, a quotation and a chat.
        shorten: in every second context of a value's search the prompts are a word shorter.
        value: options of the value's optimisation, where the caller gives none.
        values: `"search"`: each value is optimised; `"gradient"`: batches are written where their gradients
            lead; `"warm"`: each value is optimised from where its first gradient leads.
        gradient: how that is, for `"gradient"`.
        source: the paper.
    """

    layers: int = 1
    depth: float = DEFAULT_DEPTH
    batch: int | None = None
    ridge: float = 0.0
    moment: float = 1.0
    identity: float = 0.0
    null_space: float | None = None
    renew: int | None = None
    neurons: float | None = None
    preserve: bool | float = False
    suppress: tuple[float, float] | None = None
    ideal: float | None = None
    key_ridge: float | None = None
    texts: int | None = None
    forms: bool = False
    shorten: bool = False
    value: ValueOptions = field(default_factory=ValueOptions)
    values: str = "search"
    gradient: GradientOptions = field(default_factory=GradientOptions)
    source: str = ""

    @property
    def held(self) -> float:
        """`ω` as a number."""
        if self.preserve is True:
            return 1.0 / self.ridge if self.ridge > 0 else 1.0
        return float(self.preserve)


# The papers weigh `C` by 10,000 to 20,000, for models of billions of parameters whose inputs are small. Here
# it weighs 20 throughout, as SmolLM2 asks for, and what is in its unit is scaled with it.
METHODS = {
    # Joint: of 60 edits one after the other, later ones undo a quarter of the earlier.
    "engram": Method(
        layers=3, batch=100, key_ridge=30.0, texts=14, shorten=True,
        value=ValueOptions(
            learning_rate=0.8, after_weight=0.25, end_weight=0.5, stop_probability=0.9, extensions=1,
            relative=True,
        ),
        source="this package: ROME under a key that every text answers to",
    ),
    "engram-forms": Method(
        layers=3, depth=0.17, batch=1, key_ridge=30.0, texts=3, forms=True,
        value=ValueOptions(
            steps=16, learning_rate=1.6, clamp=6.0, after_weight=0.25, end_weight=0.25, stop_probability=0.9,
            relative=True,
        ),
        source="this package: `engram`, searched in the forms in which people ask",
    ),
    "rome": Method(batch=1, source="Meng et al. 2022, arXiv 2202.05262"),
    "r-rome": Method(batch=1, source="Gupta et al. 2024, arXiv 2403.07175"),
    "emmet": Method(source="Gupta et al. 2024, arXiv 2403.14236"),
    "memit": Method(layers=5, ridge=20.0, source="Meng et al. 2023, arXiv 2210.07229"),
    "alphaedit": Method(
        layers=5, batch=100, ridge=10.0, moment=0.0, identity=1.0, null_space=0.02, preserve=True,
        source="Fang et al. 2024, arXiv 2410.02355",
    ),
    "encore": Method(
        layers=5, batch=100, ridge=1.0, moment=20.0, identity=0.027, preserve=1.0,
        source="Gupta et al. 2025, arXiv 2502.01636",
    ),
    "rlsedit": Method(
        layers=5, batch=100, ridge=1.0, moment=20.0, preserve=1.0, source="Wang et al. 2026, arXiv 2601.15686"
    ),
    "evoedit": Method(
        layers=5, batch=100, ridge=4.0, moment=0.0, identity=1.0, null_space=0.02, preserve=math.inf,
        source="Lyu et al. 2025, arXiv 2510.13851",
    ),
    "betaedit": Method(
        layers=5, batch=100, ridge=1.0, moment=4.0, identity=10.0, null_space=0.02, renew=1000, preserve=1.0,
        source="Liu et al. 2026, arXiv 2605.09285",
    ),
    "nse": Method(
        layers=5, batch=100, ridge=1.0, moment=20.0, neurons=0.8, preserve=1.0,
        source="Jiang et al. 2024, arXiv 2410.04045",
    ),
    "sphere": Method(
        layers=5, batch=100, ridge=10.0, moment=0.0, identity=1.0, null_space=0.02, preserve=True,
        suppress=(0.5, 0.5), source="Liu et al. 2025, arXiv 2510.01172",
    ),
    "ultraedit": Method(
        layers=9, batch=100, ridge=1.0, moment=0.0, identity=1.0, values="gradient",
        gradient=GradientOptions("all", rate=1e-5, passes=1), source="Gu et al. 2025, arXiv 2505.14679",
    ),
    "natural": Method(
        layers=14, depth=0.37, batch=100, preserve=0.02, values="gradient",
        source="this package: natural gradients under the statistics of keys",
    ),
    "simie": Method(
        layers=5, batch=100, ridge=20.0, ideal=10.0, source="Guo et al. 2025, ICML, PMLR 267:20793",
    ),
}  # fmt: skip


def method_of(method: object) -> Method:
    """The method of a name, or the given one.

    Raises:
        ValueError: there is no such method.
    """
    if isinstance(method, Method):
        return method
    _check_name("method", method, METHODS)
    return METHODS[method]


def check_values(values: object) -> None:
    """Check how answers are to be found.

    Raises:
        ValueError: there is no such way.
    """
    if values is not None:
        _check_name("values", values, VALUES)


def check_choices(
    method: object, batch: object, conflicts: object, failures: object, values: object = None
) -> None:
    """Check the arguments that can be checked without a model.

    Raises:
        TypeError: `batch` is not an integer.
        ValueError: a name is unknown, or `batch` is not positive.
    """
    method_of(method)
    _check_name("conflicts", conflicts, CONFLICTS)
    _check_name("failures", failures, FAILURES)
    check_values(values)
    if batch is not None:
        check.integer("batch", batch)
        check.expect(batch > 0, "batch", "a positive number or None", batch)


def _check_name(name: str, value: object, known: Collection[str]) -> None:
    expected = f"one of {', '.join(map(repr, known))}"
    check.expect(isinstance(value, str) and value in known, name, expected, repr(value))
