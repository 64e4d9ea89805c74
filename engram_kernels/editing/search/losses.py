"""The loss of the value's optimisation: of the targets, and of the KL prompts (ROME, eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...hf.forward import logits_at
from ...hf.projection import Projection
from .batching import EditBatch
from .partial_forward import Context, full_logits, partial_logits

# How far predictions from recorded states may be off those of a whole pass, as a share of the largest logit.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}


class UnfitError(Exception):
    """The model cannot be run from recorded states."""


class Losses:
    """The losses of the edits still in the batch, from recorded states where the model gives them.

    The first ones are asked for with `δ` = 0, and are the unedited model's.
    """

    def __init__(self, model: nn.Module, projection: Projection, batch: EditBatch, context: Context | None):
        self.model, self.projection, self.batch, self.context = model, projection, batch, context
        self.unedited: Tensor | None = None
        self.going: Tensor | None = None

    def of(self, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The losses of every edit `[edits]` with `δ [edits, out]`.

        Returns:
            `mean −log p(target)` with the weighted `−log p(its word ends)`, the weighted `KL(p ‖ p₀)` of what
            shall stay, and the largest of the means over one row's target, or of its word's end.

        Raises:
            UnfitError: recorded states give other predictions than whole passes.
        """
        batch = self.batch
        sizes = [len(batch.labels), len(batch.end_owner), len(batch.kept_owner)]
        logits, end_logits, kept_logits = self._logits(delta).float().split(sizes)
        each = F.cross_entropy(logits, batch.labels, reduction="none")
        nll = each.new_zeros(len(delta)).index_add(0, batch.place_owner, each * batch.shares)
        places = batch.place_rows[: len(each)]
        rows = each.new_zeros(len(batch.rows)).index_add(0, places, each.detach() * batch.row_shares)
        if batch.going is not None:
            if self.going is None:
                # A tokenizer may have more tokens than the model.
                self.going = batch.going[batch.going < end_logits.shape[-1]].to(end_logits.device)
            rest = end_logits.index_fill(-1, self.going, -torch.inf)
            ended = end_logits.logsumexp(-1) - rest.logsumexp(-1)
            nll = nll.index_add(0, batch.end_owner, ended * batch.end_shares)
            rows[batch.end_rows] = rows[batch.end_rows].maximum(ended.detach())
        worst = rows.new_zeros(len(delta)).scatter_reduce(0, batch.owner, rows, "amax")
        answers = kept_logits.log_softmax(-1)
        if self.unedited is None:
            self.unedited = answers.detach()
        kept = F.kl_div(self.unedited, answers, log_target=True, reduction="none").sum(-1)
        kl = each.new_zeros(len(delta)).index_add(0, batch.kept_owner, kept * batch.kept_shares)
        return nll, kl, worst

    def keep(self, edits: list[int]) -> None:
        """Go on with some of the edits, given by their places in the batch."""
        batch = self.batch
        chosen = torch.tensor(edits, device=batch.owner.device)
        if self.context is not None:
            self.context = self.context.select(torch.isin(batch.owner, chosen).nonzero()[:, 0])
        self.unedited = self.unedited[torch.isin(batch.kept_owner, chosen)]
        self.batch = EditBatch([batch.edits[i] for i in edits], batch.owner.device, *batch.weights)

    def _logits(self, delta: Tensor) -> Tensor:
        if self.context is None:
            return full_logits(self.model, self.projection, self.batch, delta)
        logits = partial_logits(self.model, self.projection, self.batch, self.context, delta)
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
