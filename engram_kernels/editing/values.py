"""The key and the value of an edit: what the layer sees, and what it shall answer (ROME, eq. 3 and 4)."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch.nn import functional as F

from .. import _checks as check
from ..errors import EngramError
from ..hf.forward import grouped_queries, logits_at, target_predictions
from ..hf.projection import Projection, is_plain
from . import forward
from .layout import Layout, Texts

# How far predictions from recorded states may be off those of a whole pass, as a share of the largest logit.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}


@dataclass(frozen=True)
class ValueOptions:
    """How the value of an edit is optimised.

    Args:
        steps: evaluations of the loss, at most; each but the last is followed by a step of Adam.
        learning_rate: of Adam.
        clamp: the change of the value is kept within `clamp` times the norm of the value it starts from.
        weight_decay: weight of `‖δ‖ / ‖v₀‖²` in the loss.
        kl_weight: weight of the divergence of the answer to "{subject} is a" from the unedited model's.
        stop_loss: optimisation ends when the loss is below this.
        batch: how many edits are optimised side by side; None: as many as use the device well.
        incremental: in every step run only what depends on the value; False: the whole model on whole texts.
        widen: half precision is slow on a CPU without units for it: there, find values with the weights as
            float32, which takes four bytes a weight meanwhile. False: in the weights' own type always.

    Raises:
        TypeError: an option is not a number.
        ValueError: a number is out of range.
    """

    steps: int = 25
    learning_rate: float = 0.5
    clamp: float = 4.0
    weight_decay: float = 0.5
    kl_weight: float = 0.0625
    stop_loss: float = 0.05
    batch: int | None = None
    incremental: bool = True
    widen: bool = True

    def __post_init__(self):
        for name, number in (("steps", self.steps), ("batch", 1 if self.batch is None else self.batch)):
            check.integer(name, number)
            check.expect(number > 0, name, "a positive number", number)
        for name in ("incremental", "widen"):
            value = getattr(self, name)
            check.expect(isinstance(value, bool), name, "True or False", type(value).__name__, TypeError)
        for field in fields(self):
            if field.type == "float":
                check.number(field.name, getattr(self, field.name))
        for name in ("learning_rate", "clamp"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        for name in ("weight_decay", "kl_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Value:
    """The outcome of the optimisation.

    Attributes:
        key: `[in]` float32, the weighted mean over the contexts of the projection's inputs at the subject's
            last token.
        bare_key: `[in]` float32, the one in the bare prompt.
        change: `[out]` float32, `δ`: by how much the projection's answer to the key shall change.
        initial_norm: of its answer `v₀` to the bare key.
        losses: of every step.
    """

    key: torch.Tensor
    bare_key: torch.Tensor
    change: torch.Tensor
    initial_norm: float
    losses: list[float]


def value_groups(texts: Sequence[Texts], options: ValueOptions, device: torch.device) -> list[list[int]]:
    """Which edits to optimise side by side: those of like length.

    A CPU is busy with a few rows, and padding costs it more than a small batch does: there, unless a size is
    asked for, the stretch from the subject on, which every step runs, is of one length in a group.
    """
    padded = options.batch is not None or device.type != "cpu"
    size = options.batch or (64 if padded else 6)
    order = sorted(range(len(texts)), key=lambda i: texts[i].span)
    groups: list[list[int]] = []
    for _, alike in itertools.groupby(order, key=lambda i: None if padded else texts[i].span[0]):
        alike = list(alike)
        # In groups of like size: a small one for what is left over would waste the device.
        count = math.ceil(len(alike) / size)
        bounds = [math.ceil(len(alike) * number / count) for number in range(count + 1)]
        groups += [alike[start:end] for start, end in itertools.pairwise(bounds)]
    return groups


def find_values(
    model: torch.nn.Module,
    projection: Projection,
    texts: Sequence[Texts],
    weights: torch.Tensor,
    options: ValueOptions,
    progress: Callable[[int], None] | None = None,
) -> list[Value | EngramError]:
    """Optimise the values of some edits, side by side; the model stays as it is.

    `δ` of an edit is added to the projection's output at the subject's last token, in the prompt itself, in
    the prompt after each prefix, and in "{subject} is a". It minimises (Meng et al. 2022, eq. 4, and code)

        mean −log p(target) + kl_weight · KL(p ‖ p₀) + weight_decay · ‖δ‖ / ‖v₀‖²

    Each edit has its own `δ`, Adam state, clamp and end; those that have ended leave the batch.

    Args:
        model: in evaluation mode, float32, bfloat16 or float16; `δ` is float32 always.
        projection: the memory to be written.
        texts: of the edits.
        weights: `[contexts]`, the share of each context in the key.
        options: of the optimisation.
        progress: called with the steps done, out of `options.steps` an edit.

    Returns:
        The value of each edit, or what went wrong with it alone: a loss that is not finite.
    """
    device = model.get_input_embeddings().weight.device
    with _only_delta_learns(model), _widened(model, options.widen), grouped_queries(device):
        arguments = model, projection, list(texts), weights, options, progress or (lambda _: None)
        if options.incremental:
            try:
                return _optimise(*arguments, incremental=True)
            except _UnfitError as error:
                warnings.warn(f"{type(model).__name__} {error}: running it whole", stacklevel=2)
        return _optimise(*arguments, incremental=False)


class _UnfitError(Exception):
    """The model cannot be run from recorded states."""


def _optimise(model, projection, texts: list[Texts], weights, options, report, incremental: bool) -> list:
    layout = Layout(texts, model.get_input_embeddings().weight.device)
    try:
        recorded = forward.record(model, projection, layout, incremental)
    except Exception as error:
        if not incremental:
            raise
        # Models with other memories than attention's ask a cache for what it has not.
        reason = f"cannot start from recorded states ({type(error).__name__}: {error})"
        raise _UnfitError(reason) from error
    starts = recorded.values[layout.bare.to(recorded.values.device)]
    norms = starts.norm(dim=-1)
    deltas = [torch.zeros_like(start, requires_grad=True) for start in starts]
    optimizer = torch.optim.Adam(deltas, lr=options.learning_rate)
    predictions = _Predictions(model, projection, layout, recorded.context)
    losses: list[list[float]] = [[] for _ in texts]
    failed: dict[int, EngramError] = {}
    active = list(range(len(texts)))
    for step in range(options.steps):
        with torch.enable_grad():
            delta = torch.stack([deltas[i] for i in active])
            nll, kl = predictions.losses(delta)
            if not nll.requires_grad:
                raise EngramError(
                    "model: expected one that gradients pass through, got one of whose layers some stop them "
                    "(quantised activations do): make the edit on the model in full precision"
                )
            # The norm's own gradient at zero is zero, as a subgradient.
            decay = delta.norm(dim=-1) / norms[active] ** 2
            loss = nll + options.kl_weight * kl + options.weight_decay * decay.to(nll.device)
        values = loss.detach().tolist()
        for i, value in zip(active, values, strict=True):
            losses[i].append(value)
            if not math.isfinite(value):
                text = texts[i].edit.text
                why = "" if norms[i] else ": the projection answers 0, as an expert that does not get it"
                failed[i] = EngramError(f"model: expected a finite loss after {text!r}, got {value}{why}")
        going = [
            i for i, value in zip(active, values, strict=True)
            if i not in failed and value >= options.stop_loss and step < options.steps - 1
        ]  # fmt: skip
        report((len(texts) - len(going)) * options.steps + len(going) * (step + 1))
        if not going:
            break
        kept = [place for place, i in enumerate(active) if i in going]
        gradients = torch.autograd.grad(loss[kept].sum(), [deltas[i] for i in going])
        for i, gradient in zip(going, gradients, strict=True):
            deltas[i].grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for i in going:
                deltas[i] *= (options.clamp * norms[i] / deltas[i].norm()).clamp(max=1)
        if len(going) < len(active):
            predictions.keep(kept)
            active = going
    # The last row of an edit is its essence.
    keys = recorded.keys.view(len(texts), -1, recorded.keys.shape[-1])[:, :-1]
    return [
        failed.get(i)
        or Value(
            key=_mean(weights.to(keys), keys[i]),
            bare_key=keys[i, 0],
            change=deltas[i].detach(),
            initial_norm=norms[i].item(),
            losses=losses[i],
        )
        for i in range(len(texts))
    ]


def _mean(weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The weighted mean of the keys; those of tokens that an expert does not get are 0, and left out."""
    there = keys.any(-1)
    return weights @ keys if there.all() else weights[there] @ keys[there] / weights[there].sum()


class _Predictions:
    """The losses of the edits still in the batch, from recorded states where the model gives them.

    The first ones are asked for with `δ` = 0, and are the unedited model's.
    """

    def __init__(self, model, projection: Projection, layout: Layout, context: forward.Context | None):
        self.model, self.projection, self.layout, self.context = model, projection, layout, context
        self.unedited: torch.Tensor | None = None

    def _logits(self, delta: torch.Tensor) -> torch.Tensor:
        if self.context is None:
            return forward.full_logits(self.model, self.projection, self.layout, delta)
        logits = forward.partial_logits(self.model, self.projection, self.layout, self.context, delta)
        if self.unedited is None and not self._holds(logits.detach()):
            raise _UnfitError("predicts otherwise from recorded states")
        return logits

    @torch.no_grad()
    def _holds(self, logits: torch.Tensor) -> bool:
        """Whether the unedited predictions in the shortest and the longest row are those of a whole pass."""
        layout = self.layout
        for row in {int(layout.lengths.argmin()), int(layout.lengths.argmax())}:
            places = (layout.place_rows == row).nonzero()[:, 0]
            ids = torch.tensor([layout.rows[row].inputs], device=places.device)
            columns = layout.place_positions[places]
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
            if not _agree(logits[places], logits_at(self.model, places * 0, columns, **inputs)):
                return False
        return True

    def losses(self, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`mean −log p(target)` and `KL(p ‖ p₀)` of every edit `[edits]`."""
        layout = self.layout
        targets, essences = self._logits(delta).float().split([len(layout.labels), len(layout.texts)])
        each = F.cross_entropy(targets, layout.labels, reduction="none") * layout.shares
        nll = each.new_zeros(len(delta)).index_add(0, layout.place_owner, each)
        essences = essences.log_softmax(-1)
        if self.unedited is None:
            self.unedited = essences.detach()
        kl = F.kl_div(self.unedited, essences, log_target=True, reduction="none").sum(-1)
        return nll, kl

    def keep(self, edits: list[int]) -> None:
        """Go on with some of the edits, given by their places in the batch."""
        layout = self.layout
        rows = torch.isin(layout.owner, torch.tensor(edits, device=layout.owner.device)).nonzero()[:, 0]
        if self.context is not None:
            self.context = self.context.select(rows)
        self.unedited = self.unedited[edits]
        self.layout = Layout([layout.texts[i] for i in edits], layout.owner.device)


def _agree(logits: torch.Tensor, whole: torch.Tensor) -> bool:
    finite = whole.isfinite()
    error = torch.where(finite, (logits - whole).float(), 0.0).abs().max()
    scale = torch.where(finite, whole.float(), 0.0).abs().max()
    return bool(error <= AGREEMENT[whole.dtype] * scale)


@contextmanager
def _only_delta_learns(model: torch.nn.Module):
    """No parameter takes part in the backward pass, which then ends at the edited layer by itself."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def _widened(model: torch.nn.Module, widen: bool) -> Iterator[None]:
    """Half-precision weights on a CPU without units for them are float32 meanwhile, and then as they were.

    Not beside quantised ones, which take states of the type that they were made for.
    """
    widen = widen and all(map(is_plain, model.parameters()))
    units = {
        torch.bfloat16: torch.cpu._is_amx_tile_supported,
        torch.float16: getattr(torch.cpu, "_is_amx_fp16_supported", lambda: False),
    }
    narrow = [
        (parameter, parameter.data)
        for parameter in model.parameters()
        if widen
        and parameter.device.type == "cpu"
        and parameter.dtype in units
        and not units[parameter.dtype]()
    ]
    try:
        for parameter, data in narrow:
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in narrow:
            parameter.data = data


def target_log_probabilities(model: torch.nn.Module, texts: Sequence[Texts], rows: int = 32) -> list[float]:
    """`log p(target | prompt)` of each edit in its bare prompt, the sum over the target's tokens.

    Raises:
        EngramError: the model predicts NaN.
    """
    bare = [text.rewriting[0] for text in texts]
    totals = [
        chosen.sum().item()
        for start in range(0, len(bare), rows)
        for chosen, _ in target_predictions(model, bare[start : start + rows])
    ]
    for text, total in zip(texts, totals, strict=True):
        if math.isnan(total):
            raise EngramError(f"model: expected finite predictions after {text.edit.text!r}, got NaN")
    return totals
