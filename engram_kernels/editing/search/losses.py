"""The loss of the value's optimisation: of the targets, and of the KL prompts (ROME, eq. 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...hf.forward import logits_at
from ...hf.projection import Projection
from .batching import EditBatch
from .partial_forward import Context, full_logits, partial_logits

# How far predictions from recorded states may be off those of a whole pass, as a share of the largest logit.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}

# How likely a target has to be after a prompt that lacks a word, as a share of what is asked for. Where that
# is 0.9, a half: more than all else has together.
SHORTER = 5 / 9
# A logit that stands for none: a probability of exactly 0, of which a divergence is finite.
LEAST = -1e4


class UnfitError(Exception):
    """The model cannot be run from recorded states."""


class Losses:
    """The losses of the rows of a batch, from recorded states where the model gives them.

    The first ones are asked for with `δ` = 0 and of all rows, and are the unedited model's.
    """

    def __init__(self, model: nn.Module, projection: Projection, batch: EditBatch, context: Context | None):
        self.model, self.projection, self.batch = model, projection, batch
        self.context = context
        self.part: tuple[list[int], EditBatch, Context | None] | None = None
        self.unedited: Tensor | None = None
        self.going: Tensor | None = None

    def of(self, delta: Tensor, chosen: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The losses of some rows, in ascending order, with a `δ` for each, `[chosen, out]`.

        Returns:
            What they add to their edits' losses: `−log p(target)` with the weighted `−log p(its word ends)`
            and the weighted `KL(p ‖ p₀)` of what shall stay; the largest of the means over a row's target, or
            of its word's end, of which a prompt that lacks a word is forgiven `SHORTER`; and the `−log p` of
            a row's whole target, and that its word ends.

        Raises:
            UnfitError: recorded states give other predictions than whole passes.
        """
        batch, context = self._take(chosen)
        sizes = [len(batch.labels), len(batch.end_rows), len(batch.kept_rows)]
        found = self._logits(delta, batch, context)[batch.places].float()
        logits, end_logits, kept_logits = found.split(sizes)
        each = F.cross_entropy(logits, batch.labels, reduction="none")
        nothing = found.new_zeros(len(batch.rows))
        loss = nothing.index_add(0, batch.target_rows, each * batch.shares)
        missing = nothing.index_add(0, batch.target_rows, each.detach() * batch.row_shares)
        target = nothing.index_add(0, batch.target_rows, each.detach())
        if batch.going is not None:
            if self.going is None:
                # A tokenizer may have more tokens than the model.
                self.going = batch.going[batch.going < end_logits.shape[-1]].to(end_logits.device)
            rest = end_logits.index_fill(-1, self.going, -torch.inf)
            ended = end_logits.logsumexp(-1) - rest.logsumexp(-1)
            loss = loss.index_add(0, batch.end_rows, ended * batch.end_shares)
            target[batch.end_rows] += ended.detach()
            missing[batch.end_rows] = missing[batch.end_rows].maximum(ended.detach())
            # Where a word shall end, what follows it shall stay as it was where it ended.
            others = kept_logits.index_fill(-1, self.going, LEAST)
            kept_logits = torch.where(batch.kept_ends.unsqueeze(-1), others, kept_logits)
        missing = missing + batch.shorter * math.log(SHORTER)
        answers = kept_logits.log_softmax(-1)
        if self.unedited is None:
            self.unedited = answers.detach()
        unedited = self.unedited
        if batch is not self.batch:
            rows = torch.tensor(chosen, device=batch.owner.device)
            unedited = unedited[torch.isin(self.batch.kept_rows, rows)]
        kept = F.kl_div(unedited, answers, log_target=True, reduction="none").sum(-1)
        return loss.index_add(0, batch.kept_rows, kept * batch.kept_shares), missing, target

    def _take(self, chosen: list[int]) -> tuple[EditBatch, Context | None]:
        """The batch of some rows, and what their passes start from; as it was where the rows are."""
        whole = self.batch
        if len(chosen) == len(whole.rows):
            return whole, self.context
        if self.part is None or self.part[0] != chosen:
            # The one before is not held beside it.
            self.part = None
            batch = EditBatch(whole.edits, whole.owner.device, *whole.weights, chosen)
            rows = torch.tensor(chosen, device=whole.owner.device)
            self.part = chosen, batch, self.context and self.context.select(rows)
        return self.part[1:]

    def _logits(self, delta: Tensor, batch: EditBatch, context: Context | None) -> Tensor:
        if context is None:
            return full_logits(self.model, self.projection, batch, delta)
        logits = partial_logits(self.model, self.projection, batch, context, delta)
        if self.unedited is None and not self._holds(logits.detach()):
            raise UnfitError("predicts otherwise from recorded states")
        return logits

    @torch.no_grad()
    def _holds(self, logits: Tensor) -> bool:
        """Whether the unedited predictions in the shortest and the longest row are those of a whole pass."""
        batch = self.batch
        for row in {int(batch.lengths.argmin()), int(batch.lengths.argmax())}:
            places = (batch.place_rows == row).nonzero()[:, 0]
            ids = torch.tensor([batch.inputs[row]], device=places.device)
            columns = batch.place_positions[places]
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
            if not _agree(logits[places], logits_at(self.model, places * 0, columns, **inputs)):
                return False
        return True


def _agree(logits: Tensor, whole: Tensor) -> bool:
    finite = whole.isfinite()
    error = torch.where(finite, (logits - whole).float(), 0.0).abs().max()
    scale = torch.where(finite, whole.float(), 0.0).abs().max()
    return bool(error <= AGREEMENT[whole.dtype] * scale)
