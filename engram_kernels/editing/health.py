"""How a model fares under its edits: measured after every batch, and held to bounds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..errors import EngramError
from ..hf.projection import Projection
from ..hf.tokens import Row
from .held_out import text_loss, wikipedia_rows
from .reach import reached
from .statistics.corpus import wikipedia_file
from .writing.records import Write, joined_factors

T = TypeVar("T")

# Past these a warning says so. `update` tells a matrix that runs away, and not what ordinary text suffers: in
# SmolLM2 it is 0.7 to 2.6 of 47 edits by `engram`, 4.7 of one that did not take, 0.5 to 1.3 of 24 by
# `engram-forms`, text at most 1 % more perplexing, but of fifty by ROME 1.76 with 13 %, and of a thousand by
# natural gradients 0.42 with 8 %.
BOUNDS = {"growth": 1.5, "update": 3.0, "holding": 0.5, "perplexity": 0.1}

# Edits between two looks at what costs passes of the model, how many earlier ones are asked, and the text's
# rows of 128 tokens.
EVERY, SAMPLE, ROWS = 50, 32, 4
_ITERATIONS = 20


@dataclass(frozen=True)
class Health:
    """A model after a batch of edits; of several matrices the worst counts.

    Attributes:
        edits: how many stand in it, those of earlier calls among them.
        growth: `‖W‖ / ‖W₀‖`, Frobenius norms, with W₀ before any edit.
        update: `σ₁(ΔW) / σ₁(W₀)`, of the sum of all updates: largest singular values.
        holding: the share of a sample of edits of earlier batches whose prompt the model still answers with
            the target; None: not asked after this batch, or there are none.
        perplexity: by how much that of a fixed text has risen, as a share; None: not measured after this
            batch, or there is no text.
    """

    edits: int
    growth: float
    update: float
    holding: float | None = None
    perplexity: float | None = None

    def past(self, bounds: Mapping[str, float]) -> list[str]:
        """Which bounds are passed, in words."""
        found = []
        for name, bound in bounds.items():
            value = getattr(self, name)
            if value is not None and (value < bound if name == "holding" else not value <= bound):
                relation = "below" if name == "holding" else "above"
                found.append(f"{name} {value:.3g}, {relation} {bound:g}")
        return found


def check_bounds(stop_on: object) -> dict[str, float]:
    """The bounds that end a run.

    Raises:
        TypeError: it is no mapping of names to numbers.
        ValueError: there is no such measure, or a bound is negative.
        EngramError: there is no text for a perplexity.
    """
    if stop_on is None:
        return {}
    if not isinstance(stop_on, Mapping):
        raise TypeError(
            f"stop_on: expected a mapping of names to bounds or None, got {type(stop_on).__name__}"
        )
    for name, bound in stop_on.items():
        check.expect(name in BOUNDS, "stop_on", f"names among {', '.join(BOUNDS)}", repr(name))
        check.number("stop_on", bound, at_least=0)
    if "perplexity" in stop_on and wikipedia_file() is None:
        raise EngramError("stop_on: expected the package gensim, whose articles are the text, got no text")
    return {name: float(bound) for name, bound in stop_on.items()}


class HealthCheck:
    """Looks at a model after each batch, and remembers what it was before.

    The norms cost products of thin factors and are always measured; what costs passes of the model only
    where a run ends on it, and else once in `EVERY` edits.

    Args:
        model: as it is before the run.
        tokenizer: its tokenizer.
        projections: the matrices that are written.
        bases: by name, the checksum of each matrix before any edit.
        after: the writes that stand in it already.
        stop_on: the bounds that end the run.
        planned: how many edits the run is to make.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        projections: Sequence[Projection],
        bases: Mapping[str, str],
        after: Sequence[Write],
        stop_on: Mapping[str, float],
        planned: int,
    ):
        self.model, self.projections, self.stop_on = model, projections, stop_on
        self._norms = {
            projection.name: norms_before(projection, bases[projection.name], after)
            for projection in projections
        }
        self._looked = 0
        self._rows: list[list[int]] = []
        if "perplexity" in stop_on or (planned >= EVERY and wikipedia_file() is not None):
            self._rows = wikipedia_rows(tokenizer, ROWS)
            self._loss = text_loss(model, self._rows)

    def look(
        self, writes: Sequence[Write], earlier: Callable[[], Sequence[Row]], made: int, standing: int
    ) -> Health:
        """The model as it is now.

        Args:
            writes: all that stand in it.
            earlier: gives the prompts with targets of the edits of earlier batches, where they are asked.
            made: how many edits the run has made.
            standing: how many stand in the model.
        """
        growth = update = 0.0
        for projection in self.projections:
            own = [write for write in writes if write.module == projection.name]
            if own:
                norm, largest = self._norms[projection.name]
                growth = max(growth, float(projection.whole().float().norm()) / norm)
                update = max(update, largest_singular_value(*_factors(projection, own)) / largest)
        due = made - self._looked >= EVERY
        holding = perplexity = None
        sample = spread(earlier()) if due or "holding" in self.stop_on else []
        if sample:
            said = [one.said for one in reached(self.model, sample, ["an earlier edit"] * len(sample))]
            holding = sum(said) / len(said)
        if self._rows and (due or "perplexity" in self.stop_on):
            perplexity = math.expm1(min(text_loss(self.model, self._rows) - self._loss, 700.0))
        if due:
            self._looked = made
        return Health(standing, growth, update, holding, perplexity)


# Of each module the checksum of W₀ and what `norms_before` gave: forty products with a large matrix are taken
# once, not for every call. Ranks that hold parts of one make the same calls, and so find the same here.
_KNOWN: WeakKeyDictionary[nn.Module, tuple[str, float, float]] = WeakKeyDictionary()


def norms_before(projection: Projection, base: str, after: Sequence[Write]) -> tuple[float, float]:
    """`‖W₀‖` and `σ₁(W₀)`, with `W₀ = W − ΔW` of that checksum before the writes that stand in `W`."""
    checksum, *norms = _KNOWN.get(projection.module, (None,))
    if checksum != base:
        matrix = projection.whole().detach().float()
        own = [write for write in after if write.module == projection.name]
        if own:
            matrix = torch.addmm(matrix, *_factors(projection, own), alpha=-1)
        norms = float(matrix.norm()), largest_singular_value(matrix)
        _KNOWN[projection.module] = base, *norms
    return tuple(norms)


def _factors(projection: Projection, own: Sequence[Write]) -> tuple[Tensor, Tensor]:
    """The sum of a matrix's writes where the matrix lies: they are kept in main memory."""
    left, right = joined_factors(own)
    return left.to(projection.matrix.device), right.to(projection.matrix.device)


def spread(items: Sequence[T]) -> list[T]:
    """All of some items, or of many `SAMPLE`, evenly spread."""
    if len(items) <= SAMPLE:
        return list(items)
    return [items[i * len(items) // SAMPLE] for i in range(SAMPLE)]


def warn(found: Sequence[Health]) -> None:
    """Say which bounds are passed, once each, with where it began."""
    said: set[str] = set()
    for health in found:
        fresh = {name: bound for name, bound in BOUNDS.items() if name not in said}
        for name, bound in fresh.items():
            for words in health.past({name: bound}):
                said.add(name)
                warnings.warn(f"after {health.edits} edits: {words}", stacklevel=5)


def largest_singular_value(left: Tensor, right: Tensor | None = None) -> float:
    """`σ₁` of `left @ right`, or of one matrix, by power iteration: a lower bound, close if it stands out."""
    left = left.float()
    right = None if right is None else right.float()
    generator, width = torch.Generator().manual_seed(0), (left if right is None else right).shape[1]
    vector = torch.randn(width, generator=generator, device="cpu").to(left.device)
    size = vector.new_zeros(())
    for _ in range(_ITERATIONS):
        vector = vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny)
        image = left @ (vector if right is None else right @ vector)
        size = image.norm()
        vector = left.T @ image
        vector = vector if right is None else right.T @ vector
    return float(size)  # a GPU is waited for once
