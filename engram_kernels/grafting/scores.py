"""How well a model classifies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._progress import Progress
from ..errors import EngramError

BINS = 15


class ClassificationScore(NamedTuple):
    """How well a classifier does: `ece` is the expected calibration error, `rows` how many there were."""

    accuracy: float
    ece: float
    loss: float
    rows: int


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """The expected calibration error: `Σ_b n_b / n · |accuracy_b − confidence_b|` over bins of equal width.

    Args:
        probabilities: [n, labels].
        labels: [n].
        bins: of the confidence, the largest probability, over (0, 1].

    Returns:
        From 0, where the confidence is the accuracy in every bin, to 1.

    Source: Guo et al. 2017 (arXiv 1706.04599), eq. 3.
    """
    confidence, answer = probabilities.double().max(-1)
    right = (answer == labels).double()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, which.cpu(), (right - confidence).cpu())
    return float(gaps.abs().sum() / max(1, len(labels)))


@torch.inference_mode()
def classification_score(
    model: nn.Module,
    batches: Iterable[dict],
    logits_fn: Callable[[nn.Module, dict], Tensor] | None = None,
    progress: Progress | None = None,
) -> ClassificationScore:
    """Classify labelled batches, and count right answers.

    Args:
        model: in the mode that it is in.
        batches: mappings of tensors with `labels` [n].
        logits_fn: `logits_fn(model, batch)`, [n, labels], such as `PromptTask.logits`. Default:
            `model(**batch).logits`, of a model for sequence classification.
        progress: called as `progress("classify", rows done, rows)` after every batch.

    Returns:
        Accuracy, calibration error, mean loss and the number of rows.

    Raises:
        EngramError: no batch, or logits that are not finite.

    Example:
        >>> classification_score(model, task.batches(rows, 64), task.logits).accuracy
    """
    device = next(model.parameters()).device
    batches = list(batches)
    rows = sum(len(batch["labels"]) for batch in batches)
    probabilities, labels = [], []
    for batch in batches:
        batch = {key: value.to(device) for key, value in batch.items()}
        logits = logits_fn(model, batch) if logits_fn else model(**batch).logits
        probabilities.append(logits.float().softmax(-1).cpu())
        labels.append(batch["labels"].cpu())
        if progress:
            progress("classify", sum(map(len, labels)), rows)
    if not labels:
        raise EngramError("batches: expected at least one, got none")
    everything, truth = torch.cat(probabilities), torch.cat(labels)
    if not everything.isfinite().all():
        raise EngramError("model: expected finite logits, got NaN or infinity")
    accuracy = float((everything.argmax(-1) == truth).double().mean())
    loss = float(nn.functional.nll_loss(everything.clamp_min(1e-12).log(), truth))
    return ClassificationScore(accuracy, calibration_error(everything, truth), loss, len(truth))
