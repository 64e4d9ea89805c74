"""Grafts of what transformers' Trainer trained, beside its checkpoints."""

from __future__ import annotations

import inspect
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .. import _checks as check
from ..errors import EngramError
from ..grafting import Graft, graftable_parameters, localize
from ..grafting.files import holds_a_graft
from ..grafting.parameters import base_of, tensors_of
from ..grafting.recipes import complete
from ..hf.eval_mode import eval_mode
from ..hf.swapped_weights import swapped_weights
from ..ops import graft_top_k
from ..ops.waiting import raises_at_once

# What a parameter has whose rest lies with other processes (FSDP 2 and tensor parallelism, FSDP 1, ZeRO 3).
_SHARDED = ("full_tensor", "_local_shard", "ds_shape")
_OWN = ("pre_model", "ft_model", "batches", "sparsity", "include", "exclude", "base_model")


class GraftCallback(TrainerCallback):
    """Find the graft of a training, `weights after − weights before`, and save it beside the checkpoint.

    The graft has `k = round(sparsity · graftable weights)` entries: those of the largest `|after − before|`,
    or, with `batches`, those that `localize` learns from them. It is saved as `output_dir/graft` at the end
    of the training, and as `checkpoint-N/graft` in every so many checkpoints; one that an earlier run left
    there is replaced. With several processes the first one does it; weights that are spread over processes
    are refused. The model's weights, mode and gradients and torch's random state stay as they are.

    Args:
        base: the weights before: a model, a mapping of tensors by name, or a safetensors file or folder,
            which is mapped and not read into memory. None: a copy of what is trained is taken when the
            training begins, and kept in main memory.
        sparsity: the share of the graftable weights to keep; 1e-4 is 0.01 %.
        batches: what `localize` learns the positions from. None: the largest changes.
        every: checkpoints from one graft to the next, counted anew when a training goes on; None: only one at
            the end.
        folder: the graft's name.
        include, exclude: glob patterns of parameter names, as for `graftable_parameters`.
        base_model: what the graft shall call its base. Default: the configuration's name, without folders.
        **options: of `localize`: loss_fn, recipe, steps, lr, l1, accumulate, seed, progress.

    Attributes:
        graft: the last one that was saved, or None.

    Raises:
        TypeError, ValueError: an argument that cannot be used.
        EngramError: when the training begins: weights that cannot be grafted, a base that is not there, is
            another model's, or is the very model that is trained; a training that goes on from a checkpoint,
            without a base.

    Example:
        >>> callback = GraftCallback(sparsity=1e-4, every=5)
        >>> Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback]).train()
        >>> Graft.from_pretrained("out/graft").apply(base)

    Source: Panigrahi et al. 2023 (arXiv 2302.06600). Not run on a GPU.
    """

    def __init__(
        self,
        base: nn.Module | Mapping[str, Tensor] | str | os.PathLike | None = None,
        sparsity: float = 1e-4,
        batches: Iterable | None = None,
        every: int | None = None,
        folder: str = "graft",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        base_model: str | None = None,
        **options: Any,
    ):
        check.number("sparsity", sparsity, at_least=0)
        check.expect(sparsity <= 1, "sparsity", "at most 1", sparsity)
        if every is not None:
            check.integer("every", every, at_least=1)
        named = isinstance(folder, str) and folder.strip(".") != "" and Path(folder).name == folder
        check.expect(named, "folder", "a name without folders", repr(folder))
        reserved = folder.startswith(PREFIX_CHECKPOINT_DIR)
        check.expect(not reserved, "folder", f"a name that is not {PREFIX_CHECKPOINT_DIR}'s", repr(folder))
        known = set(inspect.signature(localize).parameters) - set(_OWN)
        for name in options:
            check.expect(name in known, "options", f"some of {', '.join(sorted(known))}", name, TypeError)
        lacking = batches is None and bool(options)
        check.expect(not lacking, "batches", "some, as there are options of localize", "none", TypeError)
        if batches is not None:
            check.expect(isinstance(batches, Iterable), "batches", "some", type(batches).__name__, TypeError)
            once = every is not None and isinstance(batches, Iterator)
            check.expect(not once, "batches", "some that can be gone through again", "an iterator", TypeError)
            given = {name: options.get(name) for name in ("steps", "lr", "l1")}
            complete(options.get("recipe", "rounds"), given, options.get("accumulate"), batches)
        self.base = base
        self.sparsity = sparsity
        self.batches = batches
        self.every = every
        self.folder = folder
        self.base_model = base_model
        self.options = options
        self.graft: Graft | None = None
        self._choice: dict[str, Any] = {"include": include, "exclude": exclude}
        self._before: dict[str, Tensor] = {}
        self._saves = 0

    def on_train_begin(self, args, state, control, **passed) -> None:
        """Check all that can be checked before hours are spent, and keep the weights as they are."""
        model = passed["model"]
        if not state.is_world_process_zero:
            return
        _check_whole(model)
        graftable = graftable_parameters(model, **self._choice)
        size = self._size(graftable)
        check.expect(size >= 1, "sparsity", "one weight or more", f"{self.sparsity:g}, which is none")
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        if graftable.keys().isdisjoint(trained):
            raise EngramError("model: expected graftable weights that are trained, got all of them frozen")
        others = sorted(trained.keys() - graftable.keys())
        if others:
            warnings.warn(
                f"the graft will be without {len(others)} of the {len(trained)} parameters that are trained, "
                f"such as {others[0]!r}: freeze them, or name them in include",
                stacklevel=2,
            )
        _check_replaceable(Path(args.output_dir) / self.folder)
        self._before = self._weights_before(graftable | trained, state.global_step)
        self._saves = 0

    def on_pre_optimizer_step(self, args, state, control, **passed) -> None:
        """Keep a copy of weights that are trained from here on, and were their own base until now."""
        for name, weight in passed["model"].named_parameters() if self._before else ():
            before = self._before.get(name)
            if before is not None and weight.requires_grad and _same_memory(before, weight):
                self._before[name] = weight.detach().to("cpu", copy=True)

    def on_save(self, args, state, control, **passed) -> None:
        """Save a graft into the checkpoint that was just written; one of an earlier training leaves it."""
        self._saves += 1
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / self.folder
        if self.every is not None and self._saves % self.every == 0:
            self._save(folder, state, passed["model"])
        elif state.is_world_process_zero and folder.exists():
            _check_replaceable(folder)
            shutil.rmtree(folder)

    def on_train_end(self, args, state, control, **passed) -> None:
        """Save the graft of the whole training."""
        self._save(Path(args.output_dir) / self.folder, state, passed["model"])
        self._before = {}

    def _size(self, graftable: Mapping[str, Tensor]) -> int:
        return round(self.sparsity * sum(weight.numel() for weight in graftable.values()))

    def _weights_before(self, weights: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """By name; what is not trained is its own base."""
        if self.base is None:
            if step:
                raise EngramError(
                    f"base: expected the weights from before the training, which goes on from step {step}, "
                    "got None: name the model or the folder that it began from"
                )
            return {
                name: weight.detach().to("cpu", copy=True) if weight.requires_grad else weight.detach()
                for name, weight in weights.items()
            }
        before = tensors_of(self.base, list(weights), "base")
        for name, weight in weights.items():
            given, wanted = (f"{list(x.shape)} of {x.dtype}" for x in (before[name], weight))
            if given != wanted:
                raise EngramError(f"base: expected {wanted} in {name!r}, got {given}")
            if weight.requires_grad and _same_memory(before[name], weight):
                raise EngramError(
                    f"base: expected weights that stay, got in {name!r} those that are trained: "
                    "give None, and they are copied"
                )
        return before

    def _save(self, folder: Path, state, model: nn.Module) -> None:
        if not state.is_world_process_zero:
            return
        try:
            self.graft = self._find(model)
        except EngramError as error:  # it must not take the training with it
            warnings.warn(f"no graft was saved at step {state.global_step}: {error}", stacklevel=2)
            return
        self.graft.metrics["global_step"] = state.global_step
        # Whole under another name first: at every moment there is an old graft, a new one, or none.
        fresh = folder.with_name(f".{folder.name}-new")
        for each in (folder, fresh):
            _check_replaceable(each)
        shutil.rmtree(fresh, ignore_errors=True)
        self.graft.save_pretrained(fresh)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)

    @raises_at_once
    def _find(self, model: nn.Module) -> Graft:
        named = dict(model.named_parameters())
        before = {name: weight.to(named[name].device) for name, weight in self._before.items()}
        after = {name: named[name].detach() for name in before}
        if self.batches is not None:
            # The caller's own draws must go on as if nothing had been drawn here.
            with torch.random.fork_rng(), eval_mode(model), swapped_weights(model, before):
                return localize(
                    model,
                    after,
                    self.batches,
                    sparsity=self.sparsity,
                    base_model=self.base_model,
                    **self._choice,
                    **self.options,
                )
        names = list(graftable_parameters(model, **self._choice))
        pre, ft = ({name: weights[name] for name in names} for weights in (before, after))
        masks = graft_top_k(list(pre.values()), list(ft.values()), self._size(pre))
        return Graft.from_masks(
            pre,
            ft,
            dict(zip(names, masks, strict=True)),
            **base_of(model, self.base_model),
            recipe={"name": "largest", "sparsity": self.sparsity},
        )


def _check_whole(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            raise EngramError(
                f"model: expected plain weights, got an adapter on {name!r}: save that, which is what is "
                "learned, or train without one"
            )
    for name, parameter in model.named_parameters():
        if any(hasattr(parameter, mark) for mark in _SHARDED):
            raise EngramError(f"model: expected whole weights in every process, got a part of {name!r}")


def _same_memory(before: Tensor, weight: Tensor) -> bool:
    return before.device == weight.device and before.data_ptr() == weight.data_ptr()


def _check_replaceable(folder: Path) -> None:
    """A folder that is not there, or holds the files of a graft and nothing else."""
    if folder.exists() and not holds_a_graft(folder):
        raise EngramError(f"folder: expected a new one, or a graft to replace, got {str(folder)!r}")
