"""What a `LarimarModel` is trained on: the terms of the loss and their weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .. import _checks as check

IGNORED = -100


@dataclass(frozen=True)
class Objective:
    """Weights of the terms of the loss, the negative log-probability of texts.

    Attributes:
        reconstruction: a text given what the memory answers, `−log p(x | w M)`.
        autoencoding: a text given its fact's latent, `−log p(x | z)`, without a memory.
        kl: of the addressing weights, `KL(N(w, σ²I) ‖ N(0, I))` up to a constant: `½ ‖w‖²`.
        plain: a text from the decoder alone, `−log p(x)`; a decoder that is trained stays a language model by
            it, a frozen one ignores it.
        noise: σ, added to the addressing weights in training.

    Source: Das et al. 2024 (arXiv 2403.11901).
    """

    reconstruction: float = 1.0
    autoencoding: float = 0.0
    kl: float = 0.0
    plain: float = 0.0
    noise: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            check.number(name, value, at_least=0)

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """The sum of the terms, each times its weight."""
        return sum(getattr(self, name) * value for name, value in parts.items())


def weight_divergence(weights: Tensor) -> Tensor:
    """`KL(N(w, σ²I) ‖ N(0, I))` without what depends on the fixed σ alone: the mean of `½ ‖w‖²`."""
    return weights.square().sum(-1).mean() / 2


def labelled(labels: Tensor) -> int:
    """How many last positions predict a label: from the one before the first label on."""
    columns = (labels != IGNORED).any(0).nonzero()
    first = int(columns[0]) if len(columns) else labels.shape[1] - 1
    return labels.shape[1] - max(first, 1) + 1


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over the labels of `−log p`, each predicted by the position before it.

    Args:
        logits: `[batch, kept, vocabulary]` of the last positions.
        labels: `[batch, length]`, of all positions, −100 where nothing is to be predicted.
    """
    kept = labels[:, labels.shape[1] - logits.shape[1] :][:, 1:]
    predicting = logits[:, :-1]
    return nn.functional.cross_entropy(
        predicting.reshape(-1, logits.shape[-1]).float(), kept.reshape(-1), ignore_index=IGNORED
    )
