"""A base model, its fine-tuned sister, and the grafts between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .common import Report, group_of_ranks, reading
from .examples import Examples, document_batches
from .output import note

if TYPE_CHECKING:
    from .._progress import Progress
    from ..grafting import ClassificationScore, Graft


class Trial:
    """Learns grafts in one base model that stays in memory, and tests it with and without them.

    Of the fine-tuned model only the tensors are read; to be tested, they are put into the base's modules.
    """

    def __init__(
        self,
        base: str,
        tuned: str,
        examples: Examples,
        dtype: torch.dtype,
        device: str,
        batch_size: int,
        max_length: int,
        seed: int,
    ):
        from ..hf.loading import load_model

        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.base, self.seed = base, seed
        with reading("base"):
            self.model, tokenizer = load_model(base, dtype=dtype, device=device)
        self.tuned = tuned_tensors(tuned, self.model, dtype)
        self.task = examples.task(tokenizer, max_length)
        if self.task:
            self.batches = self.task.batches(examples.rows, batch_size, seed=seed)
            self.tests = self.task.batches(examples.tests, batch_size)
        else:
            self.batches = document_batches(tokenizer, examples.documents, batch_size, max_length, seed)
            self.tests = []

    def check_sizes(self, sparsities: Sequence[float], **choice) -> None:
        """Refuse a sparsity that leaves no weight, before any of them is learned."""
        from ..grafting import graftable_parameters

        total = sum(parameter.numel() for parameter in graftable_parameters(self.model, **choice).values())
        for sparsity in sparsities:
            if not (0 < sparsity <= 1 and round(sparsity * total) >= 1):
                raise ValueError(
                    f"sparsity: expected at most 1, and at least one of {total:,} weights, got {sparsity:g}"
                )

    def learned(self, sparsity: float, progress: Report, stage: str = "learn", **options) -> Graft:
        from ..grafting import localize

        loss, told = self._loss(progress, stage)
        return localize(
            self.model,
            self.tuned,
            self.batches,
            loss,
            sparsity=sparsity,
            seed=self.seed,
            progress=told,
            group=group_of_ranks(),
            base_model=self.base,  # as the user named it: smollm2 lies in a cache of this machine
            **options,
        )

    def refitted(self, graft: Graft, steps: int, progress: Report) -> Graft:
        if group_of_ranks() is not None:
            raise ValueError("refit: expected one process, got several ranks")
        loss, told = self._loss(progress, "refit")
        return graft.refit(self.model, self.batches, loss, steps=steps, progress=told)

    def _loss(self, progress: Report, stage: str) -> tuple[Callable, Progress]:
        """The task's loss, and a progress that shows what it was."""
        loss_of = self.task.loss if self.task else lambda model, batch: model(**batch).loss
        note = ""

        def loss(model, batch):
            nonlocal note
            value = loss_of(model, batch)
            note = f"loss {float(value.detach()):.4f}"
            return value

        return loss, lambda _, done, total: progress(stage, done, total, note)

    def chosen(self, sparsity: float, how: str, **choice) -> Graft:
        """A baseline of the same size that is not learned: the "largest changes", or "random" weights."""
        from .. import checks, graft_top_k, top_k_mask
        from ..grafting import Graft, graftable_parameters

        pre = {name: p.detach() for name, p in graftable_parameters(self.model, **choice).items()}
        ft = {name: self.tuned[name].to(weight.device) for name, weight in pre.items()}
        size = round(sparsity * sum(weight.numel() for weight in pre.values()))
        if how == "random":
            generator = torch.Generator().manual_seed(self.seed)
            drawn = partial(torch.rand, generator=generator, dtype=torch.float32, device="cpu")
            draws = [drawn(weight.shape).to(weight.device) for weight in pre.values()]
            masks = top_k_mask(draws, size)
        else:
            with checks("sync"):
                masks = graft_top_k(list(pre.values()), list(ft.values()), size)
        return Graft.from_masks(pre, ft, dict(zip(pre, masks, strict=True)))

    def test(self, stage: str, progress: Report) -> ClassificationScore:
        from ..grafting import classification_score

        told = lambda _, done, rows: progress(f"test {stage}", done, rows)  # noqa: E731
        return classification_score(self.model, self.tests, self.task.logits, told)


def tuned_tensors(name: str, model: torch.nn.Module, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
    """The fine-tuned parameters under the base's names; a folder's files are mapped where they can be."""
    from ..errors import EngramError
    from ..grafting import tuned
    from ..hf.loading import load_model

    path = Path(name)
    local = path.exists() and (path.is_file() or any(path.glob("*.safetensors")) or any(path.glob("*.gguf")))
    with reading("tuned"):
        source = name if local else load_model(name, dtype=dtype)[0]
    found = tuned.tuned_tensors(source, model, [key for key, _ in model.named_parameters()], "tuned")
    found = _of_the_base_tokens(found, model)
    for key, parameter in model.named_parameters():
        if found[key].shape != parameter.shape:
            raise EngramError(
                f"tuned: expected shape {list(parameter.shape)} in {key!r}, got {list(found[key].shape)}"
            )
    return {key: tensor.to(dtype) for key, tensor in found.items()}


def _of_the_base_tokens(found: Mapping[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors without the rows of tokens that the fine-tuned model was given, behind the base's own."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    rows = {id(module.weight): len(module.weight) for module in ends if module is not None}
    cut, more = dict(found), 0
    for key, parameter in model.named_parameters():
        kept = rows.get(id(parameter))
        if kept is not None and found[key].shape[1:] == parameter.shape[1:] and len(found[key]) > kept:
            cut[key], more = found[key][:kept], len(found[key]) - kept
    if more:
        note(f"The fine-tuned model has {more:,} tokens more than the base, which are left out.")
    return cut
