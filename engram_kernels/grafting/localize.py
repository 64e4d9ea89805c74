"""Find the few fine-tuned weights that carry a skill."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..errors import EngramError
from .graft import Graft
from .mask import GraftMask
from .parameters import graftable_parameters, tensors_of
from .recipes import RECIPES, Recipe

# Gradients are used, and freed, whenever so many bytes of them have come: few launches, and no copy of the
# model in gradients.
BUCKET = 16 << 20


def localize(
    pre_model: nn.Module,
    ft_model: nn.Module | Mapping[str, Tensor] | str | os.PathLike,
    batches: Iterable,
    loss_fn: Callable[[nn.Module, object], Tensor] | None = None,
    sparsity: float = 1e-4,
    recipe: str | Recipe = "rounds",
    steps: int | None = None,
    lr: float | None = None,
    l1: float | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    accumulate: int | None = None,
    seed: int = 0,
    base_model: str | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Graft:
    """Learn which fine-tuned weights carry a skill: `min over S of loss(pre + γ(S) (ft − pre))`.

    The blend runs in the model's own parameters: for the time of the call they are given other memory, and
    their own tensors, untouched, are `pre`. Their gradients are used as they come in the backward pass, and
    freed. Memory beside the models: θ and, in fp32, S; with `accumulate` above 1 also the gradients. The
    parameters are given back as they were, after errors too.

    Args:
        pre_model: the pre-trained model; its mode (training or evaluation) is kept.
        ft_model: the fine-tuned one: a model, a mapping of tensors, or a safetensors file or folder, which is
            mapped and not read into memory (for models on the CPU).
        batches: what `loss_fn` takes, gone through again and again; an iterator only once. Mappings of
            tensors are moved to the model's device.
        loss_fn: `loss_fn(model, batch)`, a scalar, such as `PromptTask.loss`. Default: `model(**batch).loss`,
            which Hugging Face's models for language and for classification compute from labels.
        sparsity: the share of the graftable weights to find; 1e-4 is 0.01 %.
        recipe: "rounds", "panigrahi", "localize-and-stitch" (see `RECIPES`), or a `Recipe`.
        steps: gradient steps. Default: the recipe's; under "rounds", five times through the batches.
        lr: learning rate. Default: the recipe's.
        l1: weight of the sum of all gates. Default: the recipe's.
        include, exclude: glob patterns of parameter names, as for `graftable_parameters`.
        accumulate: batches a step; with more than one, gradients are kept until the last of them. Default:
            one where the recipe has rounds, else all batches.
        seed: of the logits' noise.
        base_model: what the graft shall call its base. Default: the configuration's name, without folders.
        progress: called with the steps done, their number, and the loss.

    Returns:
        The graft. Under "rounds" it has exactly `round(sparsity · weights)` entries.

    Raises:
        ValueError, TypeError: an argument that cannot be used.
        EngramError: no batch, a loss or gradients that are not finite, models that do not match.

    Example:
        >>> graft = localize(base, tuned, loader, sparsity=1e-4)
        >>> graft.save_pretrained("my-skill")

    Source: Panigrahi et al. 2023 (arXiv 2302.06600); He et al. 2024 (arXiv 2408.13656).
    """
    check.number("sparsity", sparsity, at_least=0)
    check.expect(sparsity <= 1, "sparsity", "at most 1", sparsity)
    check.integer("seed", seed)
    plan, accumulate = checked_plan(recipe, {"steps": steps, "lr": lr, "l1": l1}, accumulate, batches)
    parameters = graftable_parameters(pre_model, include, exclude)
    pre = {name: parameter.detach() for name, parameter in parameters.items()}
    ft = _matching(tensors_of(ft_model, list(pre), "ft_model"), pre)
    size = round(sparsity * sum(tensor.numel() for tensor in pre.values()))
    check.expect(size >= 1, "sparsity", "one weight or more", f"{sparsity:g}, which is none")
    stream = _endless(batches)
    loss_fn = loss_fn or _own_loss
    with torch.inference_mode(False), torch.enable_grad():
        mask = GraftMask(pre, ft, plan, size, seed)
        with _InPlace(pre_model, parameters, mask, plan) as training:
            for step in range(plan.steps):
                losses = []
                for i in range(accumulate):
                    loss = loss_fn(pre_model, _moved(next(stream), pre_model))
                    losses.append(_checked(loss))
                    training.last = i == accumulate - 1
                    (loss / accumulate).backward()
                training.flush()
                if plan.rounds and (step + 1) * plan.rounds // plan.steps > step * plan.rounds // plan.steps:
                    training.rebase()
                if progress:
                    progress(step + 1, plan.steps, sum(losses) / accumulate)
            training.report()
        chosen = mask.base if plan.rounds else mask.open()
    settings = getattr(pre_model, "config", None)
    return Graft.from_masks(
        pre,
        ft,
        dict(zip(mask.names, chosen, strict=True)),
        base_model=base_model or public_name(getattr(settings, "_name_or_path", None)),
        base_revision=getattr(settings, "_commit_hash", None),
        recipe={"name": recipe if isinstance(recipe, str) else "own", **dataclasses.asdict(plan)}
        | {"sparsity": sparsity, "accumulate": accumulate, "seed": seed},
    )


class _InPlace:
    """The model with θ in its parameters, and a mask that learns from their gradients as they come."""

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter], mask: GraftMask, plan: Recipe):
        self.model, self.mask, self.plan = model, mask, plan
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.last = True  # whether the present backward pass is the step's last
        self.pending: list[int] = []  # gradients that have come
        self.done: set[int] = set()  # and were used, in this step
        self.ever: set[int] = set()

    def __enter__(self) -> _InPlace:
        everything = list(self.model.parameters())
        self.before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in everything]
        self.hooks = []
        try:
            self.theta = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in self.mask.pre]
            self.mask.blend_(self.theta)
            for parameter in everything:
                parameter.requires_grad_(False)
                parameter.grad = None
            for i, parameter in enumerate(self.parameters):
                parameter.data = self.theta[i]
                parameter.requires_grad_(True)
                self.hooks.append(parameter.register_post_accumulate_grad_hook(partial(self._arrived, i)))
            torch.clear_autocast_cache()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_details) -> None:
        for hook in self.hooks:
            hook.remove()
        for parameter, pre in zip(self.parameters, self.mask.pre, strict=True):
            parameter.data = pre
        for parameter, requires_grad, gradient in self.before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        torch.clear_autocast_cache()

    def _arrived(self, i: int, _parameter: nn.Parameter) -> None:
        if not self.last:
            return
        if i in self.done or i in self.pending:
            raise EngramError(
                "pre_model: expected each weight's gradient once in a backward pass, got it in parts: "
                "use checkpointing with use_reentrant=False"
            )
        self.pending.append(i)
        if sum(self.parameters[j].grad.nbytes for j in self.pending) >= BUCKET:
            self._step()

    def flush(self) -> None:
        """Use the gradients that are left, and be ready for the next step."""
        # Gradients of earlier batches alone wait here for parameters that the last batch did not use.
        waiting = set(self.pending)
        self.pending += [i for i, p in enumerate(self.parameters) if p.grad is not None and i not in waiting]
        self._step()
        if not self.done:
            raise EngramError("loss_fn: expected a loss that depends on the graftable weights, got none")
        self.done.clear()
        # A caller's autocast keeps copies of the weights, and does not see what was written.
        torch.clear_autocast_cache()

    def rebase(self) -> None:
        """Take the best k positions."""
        self.mask.rebase_()
        self.mask.blend_(self.theta)
        torch.clear_autocast_cache()

    def report(self) -> None:
        """Warn of weights that no gradient ever reached: nothing was learned about them."""
        missed = [name for i, name in enumerate(self.names) if i not in self.ever]
        if missed:
            warnings.warn(
                f"no gradient reached {len(missed)} of {len(self.names)} parameters, such as {missed[0]!r}: "
                "experts that no token chose, or reentrant checkpointing of frozen inputs",
                stacklevel=3,
            )

    def _step(self) -> None:
        if not self.pending:
            return
        grads = [self.parameters[i].grad for i in self.pending]
        if not check.is_finite(torch.nn.utils.get_total_norm(grads, math.inf)):
            bad = next(self.names[i] for i in self.pending if not check.is_finite(self.parameters[i].grad))
            raise EngramError(f"loss_fn: expected finite gradients, got NaN or infinity in {bad!r}")
        out = [self.theta[i] for i in self.pending]
        self.mask.step_(self.pending, grads, out, self.plan.lr, self.plan.l1)
        for i in self.pending:
            self.parameters[i].grad = None
        self.done.update(self.pending)
        self.ever.update(self.pending)
        self.pending.clear()


def checked_plan(recipe: str | Recipe, given: dict, accumulate: int | None, batches) -> tuple[Recipe, int]:
    """The recipe with every number in its place, and the batches a step.

    Raises:
        ValueError, TypeError: an argument of `localize` that cannot be used.
    """
    if not isinstance(recipe, Recipe):
        check.expect(recipe in RECIPES, "recipe", f"one of {', '.join(RECIPES)} or a Recipe", repr(recipe))
        recipe = RECIPES[recipe]
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        check.number(name, value)
    recipe = dataclasses.replace(recipe, **given)
    try:
        count = len(batches)
    except TypeError:  # an iterator, or a loader of a stream
        count = None
    if accumulate is None:
        known = recipe.rounds or count is not None
        check.expect(known, "accumulate", "a number, as batches have no length", accumulate, TypeError)
        accumulate = 1 if recipe.rounds else max(1, count)
    check.integer("accumulate", accumulate)
    check.expect(accumulate >= 1, "accumulate", "at least 1", accumulate)
    if recipe.steps is None:
        known = count is not None
        check.expect(known, "steps", "a number, as batches have no length", recipe.steps, TypeError)
        steps = max(1, recipe.rounds) * max(1, math.ceil(count / accumulate))
        recipe = dataclasses.replace(recipe, steps=steps)
    check.integer("steps", recipe.steps)
    check.expect(
        recipe.steps >= max(1, recipe.rounds), "steps", f"at least {max(1, recipe.rounds)}", recipe.steps
    )
    return recipe, accumulate


def _matching(ft: dict[str, Tensor], pre: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in ft.items():
        if tensor.shape != pre[name].shape:
            raise EngramError(
                f"ft_model: expected shape {list(pre[name].shape)} in {name!r}, got {list(tensor.shape)}"
            )
        if tensor.dtype != pre[name].dtype:
            raise EngramError(f"ft_model: expected {pre[name].dtype} in {name!r}, got {tensor.dtype}")
    return {name: tensor.to(pre[name].device) for name, tensor in ft.items()}


def _endless(batches: Iterable) -> Iterator:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise EngramError("batches: expected at least one for each step, got no more")


def _moved(batch: object, model: nn.Module) -> object:
    if not isinstance(batch, Mapping):
        return batch
    device = next(model.parameters()).device
    if hasattr(batch, "to"):  # a BatchEncoding stays one
        # Of a copy: it moves what it holds, and the caller's batch stays where it is.
        return copy.copy(batch).to(device)
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _own_loss(model: nn.Module, batch: Mapping) -> Tensor:
    if not isinstance(batch, Mapping):
        raise TypeError(f"batches: expected mappings where no loss_fn is given, got {type(batch).__name__}")
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(
            "batches: expected labels where no loss_fn is given, got none: the model gave no loss"
        )
    return loss


def _checked(loss: Tensor) -> float:
    check.expect(isinstance(loss, Tensor), "loss_fn", "a scalar tensor", type(loss).__name__, TypeError)
    check.expect(loss.numel() == 1, "loss_fn", "a scalar tensor", f"shape {list(loss.shape)}")
    if not loss.requires_grad:
        raise EngramError("loss_fn: expected a loss that depends on the graftable weights, got none")
    value = loss.item()
    if not math.isfinite(value):
        raise EngramError(f"loss_fn: expected a finite loss, got {value}")
    return value


def public_name(name: str | None) -> str | None:
    """A model's name on the Hub, or its folder's: where the folder lies is nobody else's business."""
    return (Path(name).name if Path(name).is_dir() else name) if name else None
