"""Write a batch of edits by gradients of their loss, at every layer at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import _checks as check
from ...errors import EngramError
from ...hf.projection import Projection
from ..search.batching import EncodedEdit
from ..search.gradients import GradientOptions, Gradients, Stream, layer_gradients
from ..search.values import Value
from .preconditioner import LayerOperator, Solved
from .records import Write
from .weights import Snapshot, add_in_range

# Of the mean diagonal of the system of all edits, with no earlier ones to spare: for two that are alike.
_DAMPING = 1e-2
# Of the mean diagonal of a layer's second moment of gradients, which fewer tokens than dimensions make.
_METRIC_DAMPING = 0.1


class Written(NamedTuple):
    """The writes of a batch, one a layer, which are done, and what they did at the last layer."""

    writes: list[Write]
    values: list[Value]


def write_gradients(
    model: nn.Module,
    projections: Sequence[Projection],
    encoded: Sequence[EncodedEdit],
    operators: Mapping[int, LayerOperator],
    options: GradientOptions,
    edits: Sequence[int],
    streams: Mapping[str, Stream],
) -> Written:
    """Write a batch where its gradients lead, by one of two rules (`GradientOptions.rate`).

    Args:
        model: in evaluation mode.
        projections: of the layers, the lowest first.
        encoded: the edits.
        operators: by layer, `Q` as the method has it after the batches before.
        options: of the writes.
        edits: the numbers of the edits, to be noted in the writes.
        streams: by module, what earlier keys and gradients were like; needed with a rate alone.

    Raises:
        EngramError: a loss or a factor is not finite, or the weights leave their type's range.
    """
    seen = layer_gradients(model, projections, encoded, options.tokens)
    if options.rate is None:
        return _smallest(model, projections, encoded, operators, options, edits, seen)
    return _normalised(model, projections, encoded, operators, options, edits, seen, streams)


def _normalised(model, projections, encoded, operators, options, edits, seen: Gradients, streams) -> Written:
    """Each layer writes `E = −η ‖k̂‖² ĝ`, with keys and gradients normalised over the stream so far.

    Source: Gu et al. 2025 (arXiv 2505.14679), UltraEdit.
    """
    writes = []
    for projection, keys, gradients in zip(projections, seen.keys, seen.gradients, strict=True):
        rows = torch.cat([keys, gradients.to(keys.device)], 1)
        stream = streams.get(projection.name) or Stream.begin(rows.shape[1], rows.device)
        stream = stream.after(rows)
        key, gradient = stream.normalised(rows).split([keys.shape[1], gradients.shape[1]], 1)
        wanted = (-options.rate * key.square().sum(1, keepdim=True) * gradient).float()
        solved = operators[projection.layer].factors(projection.whole(), keys, wanted)
        writes.append(_write(projection, seen, keys, solved, edits, stream.tensor().cpu()))
    for projection, write in zip(projections, writes, strict=True):
        add_in_range(projection, write.left, write.right)
    after = layer_gradients(model, projections, encoded, options.tokens, backward=False)
    return Written(writes, _values(writes[-1], seen, [seen.losses, after.losses]))


def _smallest(model, projections, encoded, operators, options, edits, seen: Gradients) -> Written:
    """The smallest change of all layers together after which losses are low, found in some passes.

    With `g` the gradient of an edit's loss `L` at a token, and `A = (mean gᵀg)⁻¹` of a layer, damped,

        ΔW = −Σ c (g A)ᵀ (k Q),   (N + dI) c = max(L − loss, 0),   N_ij = Σ (g_t A g_sᵀ) (k_t Q k_sᵀ)

    over all layers and the tokens t and s of edits i and j. To first order the losses are `loss` then, and
    the sum over layers of `tr(A⁻¹ ΔW Q⁻¹ ΔWᵀ)` is smallest: where `Q` is `C⁻¹`, by how much answers to
    ordinary text change, most where losses feel it. It is the metric of natural gradients in two factors
    (Martens and Grosse 2015, arXiv 1503.05671), with that of keys from text. Later passes see gradients
    anew, and write under the keys of the first one, so that the rank stays that of one.
    """
    originals = list(map(Snapshot, projections))
    rights = [
        operators[projection.layer].current.apply(keys.double())
        for projection, keys in zip(projections, seen.keys, strict=True)
    ]
    lefts = [
        torch.zeros(own.shape[1], len(own), dtype=torch.float64, device=own.device) for own in seen.gradients
    ]
    metrics = list(map(_metric, seen.gradients))
    # Where earlier edits hold nearly all that gradients reach, the rest must not be bought at any price.
    free = [
        operators[projection.layer].first.apply(keys.double())
        for projection, keys in zip(projections, seen.keys, strict=True)
    ]
    damping = _DAMPING * _system(seen, free, metrics)[0].diagonal().mean()
    losses, solved = [], []
    for number in range(options.passes):
        if number:
            seen = layer_gradients(model, projections, encoded, options.tokens)
        losses.append(seen.losses)
        steps = _steps(seen, rights, metrics, damping, options.loss)
        lefts = [left + step for left, step in zip(lefts, steps, strict=True)]
        solved = [
            Solved(left.float(), right.float(), None, None) for left, right in zip(lefts, rights, strict=True)
        ]
        # The sum of all passes, added once: as a saved edit does it.
        for original, projection, own in zip(originals, projections, solved, strict=True):
            original.restore()
            add_in_range(projection, own.left, own.right)
    # The keys that later batches are to spare are those of the model as it is now.
    after = layer_gradients(model, projections, encoded, options.tokens, backward=False)
    writes = [
        _write(projection, after, keys, own, edits)
        for projection, keys, own in zip(projections, after.keys, solved, strict=True)
    ]
    return Written(writes, _values(writes[-1], after, [*losses, after.losses]))


def _metric(gradients: Tensor) -> Tensor:
    """`A = (mean gᵀg + εI)⁻¹ [out, out]`."""
    wide = gradients.double()
    moment = wide.T @ wide / len(wide)
    mean = moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    moment.diagonal().add_(_METRIC_DAMPING * mean)
    return torch.cholesky_inverse(torch.linalg.cholesky(moment))


def _steps(
    seen: Gradients, rights: Sequence[Tensor], metrics: Sequence[Tensor], damping: Tensor, loss: float
) -> list[Tensor]:
    """`−c (g A)ᵀ [out, tokens]` of each layer."""
    system, scaled = _system(seen, rights, metrics)
    system.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(system)
    if bool(failed):
        raise EngramError("edits: expected some that gradients reach, got none that they do")
    share = torch.cholesky_solve((seen.losses - loss).clamp_min(0).unsqueeze(1), factor)[:, 0][seen.owner]
    return [-(own * share.to(own.device).unsqueeze(1)).T for own in scaled]


def _system(
    seen: Gradients, rights: Sequence[Tensor], metrics: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """`N [edits, edits]`, and `g A [tokens, out]` of each layer."""
    count, owner = len(seen.losses), seen.owner
    system = torch.zeros(count, count, dtype=torch.float64, device="cpu")
    scaled = [own.double() @ metric for own, metric in zip(seen.gradients, metrics, strict=True)]
    for keys, gradients, own, right in zip(seen.keys, seen.gradients, scaled, rights, strict=True):
        each = ((gradients.double() @ own.T) * (keys.double() @ right.T)).cpu()
        columns = each.new_zeros(len(owner), count).index_add_(1, owner, each)
        system.index_add_(0, owner, columns)
    return (system + system.T) / 2, scaled


def _write(
    projection: Projection, seen: Gradients, keys: Tensor, solved: Solved, edits, stream: Tensor | None = None
) -> Write:
    """A write under some keys; without residuals, what it changes of the answers to them."""
    left, right = solved.left.float().cpu(), solved.right.float().cpu()
    keys = keys.float().cpu()
    residuals = solved.residuals
    if residuals is None:
        residuals = (keys.double() @ right.double().T) @ left.double().T
    numbers = tuple(edits[i] for i in seen.owner.tolist())
    write = Write(projection.name, left, right, keys, residuals.float().cpu(), solved.ridge, numbers, stream)
    if not (check.is_finite(left) and check.is_finite(right)):
        raise EngramError(f"edits: expected finite factors for {projection.name!r}, got NaN or infinity")
    return write


def _values(write: Write, seen: Gradients, losses: Sequence[Tensor]) -> list[Value]:
    """Of each edit the change at the last layer and the subject's token, and the losses of all passes."""
    return [
        Value(
            keys=write.keys[at : at + 1].clone(),
            change=write.residuals[at].clone(),
            initial_norm=answer.norm().item(),
            losses=[one[place].item() for one in losses],
        )
        for place, (at, answer) in enumerate(zip(seen.bare.tolist(), seen.answers, strict=True))
    ]
