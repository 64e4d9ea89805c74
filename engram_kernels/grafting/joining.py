"""Several fine-tuned models in one: trimmed, dropped out, elected, summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .._linalg import compute_dtype
from ..errors import EngramError
from ..ops import graft_blend_packed, top_k_mask
from ..ops.waiting import raises_at_once


class Method(NamedTuple):
    """How changes are thinned out and joined.

    Attributes:
        thin: "magnitude" keeps the largest, "random" drops others by chance (DARE), "rank" by chance that
            falls with their rank in the row (DELLA); None keeps all.
        elect: whether only changes of the elected sign count (TIES).
        normalise: whether the sum of the elected is divided by the weights that count at an entry.
        rescale: whether what was thinned out gets its sum of absolute values back.
        agree: whether only entries count that enough models need (TALL masks).
    """

    thin: str | None = None
    elect: bool = False
    normalise: bool = False
    rescale: bool = False
    agree: bool = False


# The names and the combinations are mergekit's, "magnitude" and "consensus" apart.
METHODS = {
    "task_arithmetic": Method(),  # Ilharco et al. 2023, arXiv 2212.04089
    "magnitude": Method("magnitude"),
    "ties": Method("magnitude", elect=True, normalise=True),  # Yadav et al. 2023, arXiv 2306.01708
    "dare_linear": Method("random", rescale=True),  # Yu et al. 2024, arXiv 2311.03099
    "dare_ties": Method("random", elect=True, rescale=True),
    "della": Method("rank", elect=True, normalise=True, rescale=True),  # Deep et al. 2024, arXiv 2406.11617
    "della_linear": Method("rank", rescale=True),
    "consensus": Method(agree=True),  # Wang et al. 2024, arXiv 2405.07813
}


class Options(NamedTuple):
    """What a method is told.

    Attributes:
        weights: one a model.
        density: the share of each change to keep, above 0 and at most 1.
        scale: λ, of the joined change.
        epsilon: DELLA's: the chances to be kept lie within `density ± epsilon`.
        tall: λ of the TALL masks, `|τ| ≥ λ |Σ w τ − τ|`: which entries a model needs.
        agreement: how many models must need an entry.
    """

    weights: tuple[float, ...]
    density: float = 1.0
    scale: float = 1.0
    epsilon: float = 0.15
    tall: float = 0.4
    agreement: int = 2

    def method_of(self, method: str) -> Method:
        """The method of that name.

        Raises:
            TypeError, ValueError: there is none, or an option cannot be used with it.
        """
        check.expect(method in METHODS, "method", f"one of {', '.join(METHODS)}", repr(method))
        for weight in self.weights:
            check.number("weights", weight)
        for name in ("density", "tall"):
            check.number(name, getattr(self, name), above=0)
        check.expect(self.density <= 1, "density", "at most 1", self.density)
        check.number("scale", self.scale)
        check.integer("agreement", self.agreement, at_least=1)
        known = METHODS[method]
        if known.thin == "rank" and self.density < 1:
            check.number("epsilon", self.epsilon, at_least=0)
            fits = 0 < self.density - self.epsilon and self.density + self.epsilon < 1
            check.expect(fits, "epsilon", f"one with {self.density} ± epsilon within (0, 1)", self.epsilon)
        return known


@raises_at_once
def trim(change: Tensor, density: float) -> Tensor:
    """Keep the `⌊density · n⌋` largest of a tensor's entries by magnitude, at least one; make the others 0.

    Of equal ones the first are kept. By the packed mask of `top_k_mask`: nothing is sorted.

    Args:
        change: [...], fp32, bf16, fp16 or fp64.
        density: above 0, at most 1.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        ValueError: an entry is not finite.

    Example:
        >>> trim(torch.tensor([1.0, -3.0, 2.0]), 0.67)
        tensor([ 0., -3.,  2.])

    Source: Yadav et al. 2023 (arXiv 2306.01708), section 3.
    """
    if density >= 1 or not change.numel():
        return change.clone()
    # A model has scales of one number, and a graft few entries in most tensors: no tensor loses all it has.
    k = max(1, int(density * change.numel()))
    (mask,) = top_k_mask([change.abs()], k)
    return graft_blend_packed(torch.zeros_like(change), change, mask)


def drop(change: Tensor, chances: Tensor | float, generator: torch.Generator | None) -> Tensor:
    """Keep each entry with its chance, and make the others 0."""
    # Where mergekit rounds chances to bf16, nothing is gained: they stay fp32.
    chances = torch.as_tensor(chances, dtype=torch.float32, device=change.device).expand(change.shape)
    kept = torch.bernoulli(chances, generator=generator)
    return change * kept.to(change.dtype)


def rank_chances(change: Tensor, density: float, epsilon: float) -> Tensor:
    """Chances from `density − ε` of a row's smallest entry to `density + ε` of its largest, even by rank.

    Args:
        change: [..., n]; a vector is one row, and of more dimensions each last one.

    Source: Deep et al. 2024 (arXiv 2406.11617), MAGPRUNE.
    """
    rows = change.abs().reshape(-1, change.shape[-1] if change.dim() else 1)
    steps = torch.linspace(0, 1, rows.shape[1], dtype=torch.float32, device=rows.device)
    order = rows.argsort(dim=1)
    ranks = torch.empty_like(rows, dtype=torch.float32).scatter_(1, order, steps.expand(rows.shape))
    return (density - epsilon + 2 * epsilon * ranks).view(change.shape)


def join(
    base: Tensor,
    tuned: Sequence[Tensor],
    method: str,
    options: Options,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Join several fine-tuned tensors: `base + λ Σ wᵢ τᵢ`, `τᵢ = tunedᵢ − base`, as the method says.

    Sums are fp32 (fp64 of fp64), and are rounded once.

    Args:
        base, tuned: [...] each, of one shape and dtype.
        method: a key of `METHODS`.
        options: the weights, and what else the method asks for.
        generator: of what is dropped by chance.

    Returns:
        A new tensor like base.
    """
    known, wide = options.method_of(method), compute_dtype(base)
    changes = []
    for tensor in tuned:
        change = tensor.to(base.device, wide) - base.to(wide)
        changes.append(_thinned(change, known, options, generator))
    total = torch.zeros_like(base, dtype=wide)
    for change, weight in zip(changes, options.weights, strict=True):
        total.add_(change, alpha=weight)
    if known.elect:
        total = _elected(changes, options.weights, total >= 0, known.normalise)
    if known.agree:
        needed = torch.zeros_like(base, dtype=torch.int32)
        for change in changes:
            needed += change.abs() >= options.tall * (total - change).abs()
        total.mul_(needed >= options.agreement)
    return torch.add(base.to(wide), total, alpha=options.scale).to(base.dtype)


def _thinned(change: Tensor, method: Method, options: Options, generator: torch.Generator | None) -> Tensor:
    if method.thin is None or options.density >= 1:
        return change
    if method.thin == "magnitude":
        thin = trim(change, options.density)
    elif method.thin == "random":
        thin = drop(change, options.density, generator)
    else:
        thin = drop(change, rank_chances(change, options.density, options.epsilon), generator)
    if not method.rescale:
        return thin
    before, after = change.abs().sum(), thin.abs().sum()
    small = 1e-7  # as mergekit: what is next to nothing is not blown up
    return torch.where((before < small) | (after < small), thin, thin * (before / after))


def _elected(
    changes: Sequence[Tensor], weights: Sequence[float], positive: Tensor, normalise: bool
) -> Tensor:
    """The sum of the changes of the elected sign, and its mean by the weights that count."""
    total, counted = torch.zeros_like(changes[0]), torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        weighted = change * weight
        agrees = torch.where(positive, weighted > 0, weighted < 0)
        total += weighted * agrees
        if normalise:
            counted.add_(agrees, alpha=weight)
    return total / torch.where(counted == 0, 1.0, counted) if normalise else total


def join_state_dicts(
    base: Mapping[str, Tensor],
    tuned: Sequence[Mapping[str, Tensor]],
    method: str = "ties",
    weights: Sequence[float] | None = None,
    density: float = 1.0,
    scale: float = 1.0,
    epsilon: float = 0.15,
    tall: float = 0.4,
    agreement: int = 2,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Join several models that were fine-tuned from one base, tensor by tensor.

    Args:
        base: the pre-trained tensors by name.
        tuned: the fine-tuned ones, at least one mapping; names that base lacks are left out.
        method: "task_arithmetic", "magnitude", "ties", "dare_linear", "dare_ties", "della", "della_linear"
            (as mergekit calls and defines them, "magnitude" apart), or "consensus" (TALL masks).
        weights: one a model. Default: 1 each.
        density: the share of each tensor's changes to keep, for all but task_arithmetic and consensus.
        scale: λ, of the joined change.
        epsilon: of DELLA: the chances to be kept lie within `density ± epsilon`.
        tall: λ of the TALL masks: a model needs an entry where `|τ| ≥ λ |Σ w τ − τ|`.
        agreement: of "consensus": how many models must need an entry.
        seed: of what is dropped by chance.

    Returns:
        New tensors by base's names. Tensors of integers are base's.

    Raises:
        TypeError, ValueError: an argument that cannot be used.
        EngramError: a tensor is missing, of another shape, quantised, or has an entry that is not finite.

    Example:
        >>> joined = join_state_dicts(base, [maths, code], "ties", density=0.2)

    Source: see `METHODS`.
    """
    tuned = list(tuned)
    check.expect(len(tuned) > 0, "tuned", "at least one model", "none")
    given = tuple(weights) if weights is not None else (1.0,) * len(tuned)
    check.expect(len(given) == len(tuned), "weights", f"{len(tuned)} numbers", len(given))
    options = Options(given, density, scale, epsilon, tall, agreement)
    options.method_of(method)
    check.integer("seed", seed)
    generators: dict[torch.device, torch.Generator] = {}
    joined = {}
    for name, tensor in base.items():
        for number, model in enumerate(tuned):
            if name not in model:
                raise EngramError(f"tuned: expected a tensor {name!r} in number {number}, got none")
            if model[name].shape != tensor.shape:
                raise EngramError(
                    f"tuned: expected shape {list(tensor.shape)} in {name!r} of number {number}, "
                    f"got {list(model[name].shape)}"
                )
        if not tensor.is_floating_point():
            joined[name] = tensor.clone()
            continue
        _check_weight("base", tensor, repr(name))
        for number, model in enumerate(tuned):
            _check_weight("tuned", model[name], f"{name!r} of number {number}")
        if tensor.device not in generators:
            generators[tensor.device] = torch.Generator(tensor.device).manual_seed(seed)
        others = [model[name].detach() for model in tuned]
        joined[name] = join(tensor.detach(), others, method, options, generators[tensor.device])
    return joined


def _check_weight(argument: str, tensor: Tensor, place: str) -> None:
    if tensor.dtype not in check.WEIGHT_DTYPES:
        raise EngramError(f"{argument}: expected plain weights, got {tensor.dtype} in {place}")
    if not check.is_finite(tensor):
        raise EngramError(f"{argument}: expected finite weights, got NaN or infinity in {place}")
