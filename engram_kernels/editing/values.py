"""The key and the value of an edit: what the layer sees, and what it shall answer (ROME, eq. 3 and 4)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch.nn import functional as F

from .. import _checks as check
from ..errors import EngramError
from . import forward
from .layout import Layout, Texts
from .passes import target_predictions
from .structure import Projection

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
    size = options.batch or (64 if padded else 4)
    groups: list[list[int]] = []
    for i in sorted(range(len(texts)), key=lambda i: texts[i].span):
        group = groups[-1] if groups else []
        if 0 < len(group) < size and (padded or texts[group[0]].span[0] == texts[i].span[0]):
            group.append(i)
        else:
            groups.append([i])
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

        mean −log p(target) + kl_weight · KL(p₀ ‖ p) + weight_decay · ‖δ‖ / ‖v₀‖²

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
    with _only_delta_learns(model), _widened(model, options.widen):
        return _optimise(model, projection, list(texts), weights, options, progress or (lambda _: None))


def _optimise(model, projection: Projection, texts: list[Texts], weights, options, report) -> list:
    layout = Layout(texts, model.get_input_embeddings().weight.device)
    recorded = _record(model, projection, layout, options.incremental)
    starts = recorded.values[layout.bare.to(recorded.values.device)]
    norms = starts.norm(dim=-1)
    deltas = [torch.zeros_like(start, requires_grad=True) for start in starts]
    optimizer = torch.optim.Adam(deltas, lr=options.learning_rate)
    predictions = _Predictions(model, projection, layout, recorded)
    losses: list[list[float]] = [[] for _ in texts]
    failed: dict[int, EngramError] = {}
    active = list(range(len(texts)))
    for step in range(options.steps):
        with torch.enable_grad():
            delta = torch.stack([deltas[i] for i in active])
            nll, kl = predictions.losses(delta)
            # The norm's own gradient at zero is zero, as a subgradient.
            decay = delta.norm(dim=-1) / norms[active] ** 2
            loss = nll + options.kl_weight * kl + options.weight_decay * decay.to(nll.device)
        values = loss.detach().tolist()
        for i, value in zip(active, values, strict=True):
            losses[i].append(value)
            if not math.isfinite(value):
                text = texts[i].edit.text
                failed[i] = EngramError(f"model: expected a finite loss after {text!r}, got {value}")
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
            key=weights.to(keys) @ keys[i],
            bare_key=keys[i, 0],
            change=deltas[i].detach(),
            initial_norm=norms[i].item(),
            losses=losses[i],
        )
        for i in range(len(texts))
    ]


def _record(model, projection: Projection, layout: Layout, incremental: bool) -> forward.Record:
    """One whole pass; with the states to go on from, where they are wanted and the model gives them."""
    recorded, reason = None, "it keeps no keys and values"
    if incremental:
        try:
            recorded = forward.record(model, projection, layout, cached=True)
        except Exception as error:
            # Models with other memories than attention's ask a cache for what it has not.
            reason = f"{type(error).__name__}: {error}"
        if recorded is not None and recorded.context is not None:
            return recorded
        warnings.warn(f"{type(model).__name__} cannot start from recorded states ({reason})", stacklevel=2)
    return recorded or forward.record(model, projection, layout, cached=False)


class _Predictions:
    """The losses of the edits still in the batch, from recorded states where the model gives them."""

    def __init__(self, model, projection: Projection, layout: Layout, recorded: forward.Record):
        self.model, self.projection, self.layout = model, projection, layout
        self.unedited = recorded.logits[len(layout.labels) :].float().log_softmax(-1)
        self.context = recorded.context
        # Of the whole pass, to hold the first partial one against.
        self.whole: torch.Tensor | None = recorded.logits

    def _logits(self, delta: torch.Tensor) -> torch.Tensor:
        if self.context is not None:
            logits = forward.partial_logits(self.model, self.projection, self.layout, self.context, delta)
            whole, self.whole = self.whole, None
            if whole is None or _agree(logits.detach(), whole):
                return logits
            self.context = None
            name = type(self.model).__name__
            warnings.warn(f"{name} predicts otherwise from recorded states: running it whole", stacklevel=2)
        return forward.full_logits(self.model, self.projection, self.layout, delta)

    def losses(self, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`mean −log p(target)` and `KL(p₀ ‖ p)` of every edit `[edits]`."""
        layout = self.layout
        logits = self._logits(delta).float()
        count = len(layout.labels)
        each = F.cross_entropy(logits[:count], layout.labels, reduction="none") * layout.shares
        nll = each.new_zeros(len(delta)).index_add(0, layout.place_owner, each)
        kl = F.kl_div(logits[count:].log_softmax(-1), self.unedited, log_target=True, reduction="none").sum(
            -1
        )
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
    """Half-precision weights on a CPU without units for them are float32 meanwhile, and then as they were."""
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
