"""How a mask is learned: what the sources do, and the default."""

from dataclasses import dataclass


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
        steps: gradient steps.
        rounds: how often the base mask becomes the k positions of the highest score `s S`, at even
            intervals, the last time at the end; 0: never, and the result is every gate above ½.
    """

    base: bool
    inside: float
    outside: float
    noise: float
    bias: float
    lr: float
    l1: float
    steps: int
    rounds: int


RECIPES = {
    # A gate that stands 10 from its threshold has the same slope, 4.5e-5, everywhere: the score s S collects
    # −g (ft − pre), the first-order change of the loss, at the grafted point; each round takes the best k.
    "rounds": Recipe(True, 0.0, 0.0, 0.0, bias=10.0, lr=1.0, l1=0.0, steps=64, rounds=4),
    "panigrahi": Recipe(True, 0.0, 0.0, 1.0, bias=10.0, lr=1e7, l1=0.0, steps=100, rounds=0),
    "localize-and-stitch": Recipe(False, 5.0, -5.0, 0.0, bias=0.0, lr=1e7, l1=10.0, steps=100, rounds=0),
}
