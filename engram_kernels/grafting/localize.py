"""Find the few fine-tuned weights that carry a skill."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import _checks as check
from .._hashing import tensor_checksum
from .._progress import Progress
from .._ranks import Ranks
from ..errors import EngramError
from ..hf.placement import unwrapped, whole_model
from .batches import checked, endless, moved, own_loss
from .graft import Graft
from .mask import GraftMask
from .parameters import base_of, graftable_parameters
from .recipes import Recipe, complete
from .training import MaskTraining
from .tuned import check_difference, split_tuned

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def localize(
    pre_model: nn.Module,
    ft_model: nn.Module | Mapping[str, Tensor] | str | os.PathLike,
    batches: Iterable = (),
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
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
) -> Graft:
    """Learn which fine-tuned weights carry a skill: `min over S of loss(pre + γ(S) (ft − pre))`.

    The blend runs in the model's own parameters: for the time of the call they are given other memory, and
    their own tensors, untouched, are `pre`. Their gradients are used as they come in the backward pass, and
    freed. Memory beside the models: θ and, in fp32, S; with `accumulate` above 1 also the gradients. The
    parameters are given back as they were, after errors too.

    Args:
        pre_model: the pre-trained model; its mode (training or evaluation) is kept.
        ft_model: the fine-tuned one: a model, whose adapters (PEFT's, transformers') are merged into copies
            of the weights; a mapping of tensors; a safetensors file or folder, which is mapped and not read
            into memory (for models on the CPU); an adapter's folder; a checkpoint that transformers converts
            as it loads it (experts, other prefixes, GGUF), which takes the memory of a model.
        batches: what `loss_fn` takes, gone through again and again; an iterator only once. Mappings of
            tensors are moved to the model's device. Not needed by "largest".
        loss_fn: `loss_fn(model, batch)`, a scalar, such as `PromptTask.loss`. Default: `model(**batch).loss`,
            which Hugging Face's models for language and for classification compute from labels.
        sparsity: the share of the graftable weights to find; 1e-4 is 0.01 %.
        recipe: "rounds", "largest", "panigrahi", "localize-and-stitch" (see `RECIPES`), or a `Recipe`.
        steps: gradient steps. Default: the recipe's; under "rounds", five times through the batches.
        lr: learning rate. Default: the recipe's.
        l1: weight of the sum of all gates. Default: the recipe's.
        include, exclude: glob patterns of parameter names, as for `graftable_parameters`.
        accumulate: batches a step; with more than one, gradients are kept until the last of them. Default:
            one where the recipe has rounds, else all batches.
        seed: of the logits' noise.
        base_model: what the graft shall call its base. Default: the configuration's name, without folders.
        progress: called as `progress("localize", steps done, steps)` after every step.
        group: of torch.distributed: its ranks, each with a replica of the models, share the batches of a
            step, rank r of R taking every R-th, and learn one mask. Every rank gives the same batches;
            `accumulate` counts those of all ranks, R where it is not given and the recipe has rounds.
            Gradients are kept until the end of a step. None: this process alone.

    Returns:
        The graft. Under "rounds" and "largest" it has exactly `round(sparsity · weights)` entries. Its
        metrics hold the first and the last step's loss, where there are steps, and as `changed_outside` the
        names of the parameters that are not graftable, and so stay the base's, though the fine-tuned model
        changed them.

    Raises:
        ValueError, TypeError: an argument that cannot be used.
        EngramError: no batch, weights, a loss or gradients that are not finite, models that do not match or
            do not differ, a model in DistributedDataParallel without a group, or an error on another rank.

    Example:
        >>> graft = localize(base, tuned, loader, sparsity=1e-4)
        >>> graft.save_pretrained("my-skill")
        >>> smaller = localize(base, tuned, sparsity=1e-5, recipe="largest").refit(base, loader)

    Source: Panigrahi et al. 2023 (arXiv 2302.06600); He et al. 2024 (arXiv 2408.13656).
    """
    check.number("sparsity", sparsity, at_least=0)
    check.expect(sparsity <= 1, "sparsity", "at most 1", sparsity)
    check.integer("seed", seed)
    ranks = Ranks(group)
    if isinstance(pre_model, nn.Module):
        pre_model = unwrapped(pre_model) if ranks.size > 1 else whole_model(pre_model)
    settings = {"steps": steps, "lr": lr, "l1": l1}
    plan, steps, accumulate = complete(recipe, settings, accumulate, batches, ranks.size)
    parameters = graftable_parameters(pre_model, include, exclude)
    pre = {name: parameter.detach() for name, parameter in parameters.items()}
    tuned, outside = split_tuned(ft_model, pre_model, pre, "ft_model")
    ft = _matching(tuned, pre)
    check_difference(pre, ft, outside, "ft_model")
    size = round(sparsity * sum(tensor.numel() for tensor in pre.values()))
    check.expect(size >= 1, "sparsity", "one weight or more", f"{sparsity:g}, which is none")
    stream = itertools.islice(endless(batches), ranks.rank, None, ranks.size)
    loss_of = loss_fn or own_loss
    with ranks.failing_together(), torch.inference_mode(False), torch.enable_grad():
        mask = GraftMask(pre, ft, plan, size, seed)
        losses = []
        training = MaskTraining(pre_model, parameters, mask, plan, ranks)
        # What takes no step needs no memory for θ.
        with training if steps else nullcontext():

            def backward() -> float:
                total, share = 0.0, accumulate // ranks.size
                for i in range(share):
                    loss = loss_of(pre_model, moved(next(stream), pre_model))
                    total += checked(loss)
                    training.last = i == share - 1
                    (loss / accumulate).backward()
                return total

            for step in range(steps):
                losses.append(sum(ranks.each(backward)) / accumulate)
                training.flush()
                if plan.rounds and (step + 1) * plan.rounds // steps > step * plan.rounds // steps:
                    training.rebase()
                if progress:
                    progress("localize", step + 1, steps)
            if steps:
                training.report()
        chosen = mask.base if plan.rounds and mask.base else mask.open()
        ranks.check_same("pre_model", [tensor_checksum(packed) for packed in chosen])
    return Graft.from_masks(
        pre,
        ft,
        dict(zip(mask.names, chosen, strict=True)),
        **base_of(pre_model, base_model),
        recipe={"name": recipe if isinstance(recipe, str) else "own", **dataclasses.asdict(plan)}
        | {"sparsity": sparsity, "accumulate": accumulate, "seed": seed},
        metrics=({"first_loss": losses[0], "last_loss": losses[-1]} if losses else {})
        | ({"changed_outside": outside} if outside else {}),
    )


def _matching(ft: dict[str, Tensor], pre: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in ft.items():
        if tensor.shape != pre[name].shape:
            raise EngramError(
                f"ft_model: expected shape {list(pre[name].shape)} in {name!r}, got {list(tensor.shape)}"
            )
        if tensor.dtype != pre[name].dtype:
            raise EngramError(f"ft_model: expected {pre[name].dtype} in {name!r}, got {tensor.dtype}")
    return {name: tensor.to(pre[name].device) for name, tensor in ft.items()}
