"""How a mask is learned: what the sources do, and the default."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .. import _checks as check


@dataclass(frozen=True)
class Recipe:
    """How `localize` learns a mask. The gate is `γ = σ(s (S − bias))`, `s = −1` in the base mask, else +1.

    Attributes:
        base: whether the k largest `|ft − pre|` are the base mask, whose flips S encodes.
        inside: S at the start in those k positions.
        outside: S at the start elsewhere.
        noise: S is drawn from `U[0, noise)` on top of that.
        bias: the gate's bias.
        lr: the learning rate of plain gradient descent on S.
        l1: the weight of the sum of all gates in the loss.
        layered: whether each layer has its share of the k positions, by how many of its weights changed;
            else they are the best of all layers together.
        steps: gradient steps; None: each round goes once through the batches.
        rounds: how often the base mask becomes the k positions of the highest score `s S`, at even
            intervals, the last time at the end; 0: never, and the result is every gate above ½.
    """

    base: bool = False
    inside: float = 0.0
    outside: float = 0.0
    noise: float = 0.0
    bias: float = 10.0
    lr: float = 1.0
    l1: float = 0.0
    layered: bool = False
    steps: int | None = None
    rounds: int = 0


RECIPES = {
    # Not from a paper. A gate that stands 10 from its threshold has the same slope, 4.5e-5, everywhere: the
    # score s S collects −g (ft − pre), the first-order change of the loss, first at pre and then at the
    # grafted point; each round takes the best k. Gates never open half, and exactly k are open.
    "rounds": Recipe(rounds=5),
    # The k largest |ft − pre|, as Ansell et al. 2022 choose them for sparse fine-tuning; but each layer has
    # its share. Refitted they do more than positions of the highest scores.
    "largest": Recipe(base=True, layered=True, steps=0),
    # Panigrahi et al. 2023: S from U[0, 1), bias 10 (Grafting.py); lr 1e7, 10 steps (run_graft_task.sh), each
    # on the mean gradient of up to 128 batches; γ rounded (src/graft_trainer.py). There the mask of the step
    # with the best training and validation score is kept, here the last.
    "panigrahi": Recipe(base=True, noise=1.0, lr=1e7, steps=10),
    # He et al. 2024: S = ±5, lr 1e7, 10 steps (language/main_localize_stitch.py). There l1 is 10 without the
    # factor lr, which is 1e-6 here; the gradient is the batches' sum where ours is their mean; and the code's
    # term pushes S away from 0, where the paper and this package lessen Σ γ (localize_utils.py).
    "localize-and-stitch": Recipe(inside=5.0, outside=-5.0, bias=0.0, lr=1e7, l1=1e-6, steps=10),
}


def complete(
    recipe: str | Recipe, given: Mapping[str, Any], accumulate: int | None, batches: Any, ranks: int = 1
) -> tuple[Recipe, int, int]:
    """The recipe, its gradient steps and the batches a step.

    Args:
        recipe: a recipe, or the name of one.
        given: what takes the place of the recipe's own steps, lr and l1, where it is not None.
        accumulate: batches a step; None: the recipe's.
        batches: of `localize`; only their number is asked for.
        ranks: that share the batches of a step.

    Raises:
        ValueError, TypeError: an argument of `localize` that cannot be used.
    """
    if not isinstance(recipe, Recipe):
        check.expect(recipe in RECIPES, "recipe", f"one of {', '.join(RECIPES)} or a Recipe", repr(recipe))
        recipe = RECIPES[recipe]
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        check.number(name, value)
    least = 0 if recipe.steps == 0 else max(1, recipe.rounds)
    recipe = replace(recipe, **given)
    if recipe.steps == 0 == least:
        return recipe, 0, ranks
    rounds = max(1, recipe.rounds)
    if accumulate is None:
        every = 1 if recipe.rounds else max(1, _count("accumulate", batches))
        accumulate = math.ceil(every / ranks) * ranks
    check.integer("accumulate", accumulate, at_least=1)
    check.expect(accumulate % ranks == 0, "accumulate", f"a multiple of the {ranks} ranks", accumulate)
    steps = recipe.steps
    if steps is None:
        steps = rounds * max(1, math.ceil(_count("steps", batches) / accumulate))
    check.integer("steps", steps, at_least=least)
    return replace(recipe, steps=steps), steps, accumulate


def _count(argument: str, batches: Any) -> int:
    try:
        return len(batches)
    except TypeError:  # an iterator, or a loader of a stream
        raise TypeError(f"{argument}: expected a number, as batches have no length, got None") from None
