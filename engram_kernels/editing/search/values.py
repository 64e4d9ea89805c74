"""The key and the value of an edit: what the layer sees, and what it shall answer (ROME, eq. 3 and 4)."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ... import _checks as check
from ..._progress import Progress
from ...errors import EngramError
from ...hf.attention import fast_attention
from ...hf.offload import weights_read_again
from ...hf.placement import input_device
from ...hf.projection import Projection, is_plain
from ...hf.swapped_weights import swapped_weights
from .batching import EditBatch, EncodedEdit
from .losses import Losses, UnfitError
from .partial_forward import record
from .standing import Standing

# Above it a target has not been reached: its probability is below a half.
MISSED = math.log(2)


@dataclass(frozen=True)
class ValueOptions:
    """How the value of an edit is optimised.

    Args:
        steps: evaluations of the loss, at most; each but the last is followed by a step of Adam.
        learning_rate: of Adam.
        clamp: the change of the value is kept within `clamp` times `‖v₀‖`, the norm of the value it starts
            from.
        weight_decay: weight of `‖δ‖ / ‖v₀‖²` in the loss.
        kl_weight: weight of the divergence of the answer to "{subject} is a" from the unedited model's.
        after_weight: weight of the same divergence of what follows the target where its word ends, in the
            mean over all texts; 0, as published: anything may follow.
        end_weight: weight of `−log p` that a word ends with the target, in the mean over all texts, so that
            "Rom" does not go on as "Romulus"; of scripts with spaces between words, and of edits that do not
            allow for suffixes (`Edit.suffixes`). 0, as published: it may.
        stop_loss: optimisation ends when the loss is below this.
        stop_probability: it also ends when in every text the target's tokens have at least this probability,
            as their geometric mean; 5/9 of it where the prompt lacks a word. A text where they have it is
            computed at every fourth step, and before the end. None: it does not, and every text is.
        extensions: how often an edit goes on that has a prompt whose target, with the end of its word, is
            still below a half after all steps, each time for as many steps more and with twice the clamp: of
            scripts that a model hardly knows.
        batch: how many edits are optimised side by side; None: as many as use the device well.
        relative: `‖v₀‖` is the mean over all texts without what earlier edits of the subject changed, and the
            learning rate a share of the root mean square of `v₀`, whatever a model's scale; clamp and decay
            are of all changes of the subject together. False, as published: `‖v₀‖` is that of the bare prompt
            as it is, which can be a sixth of the others.
        warm: begin where the first gradient `g` leads: `δ = −L g / ‖g‖²`, after which the loss `L` would be 0
            if it were linear; Adam goes on from there.
        incremental: a step runs only what depends on the value; False: the whole model on whole texts.
        widen: on a CPU without units for half precision, find values with the weights as float32, which takes
            four bytes a weight meanwhile. False: always in the weights' own type.

    Raises:
        TypeError: an option is not a number.
        ValueError: a number is out of range.
    """

    steps: int = 25
    learning_rate: float = 0.5
    clamp: float = 4.0
    weight_decay: float = 0.5
    kl_weight: float = 0.0625
    after_weight: float = 0.0
    end_weight: float = 0.0
    stop_loss: float = 0.05
    stop_probability: float | None = None
    extensions: int = 0
    batch: int | None = None
    relative: bool = False
    warm: bool = False
    incremental: bool = True
    widen: bool = True

    def __post_init__(self):
        check.integer("steps", self.steps, at_least=1)
        check.integer("extensions", self.extensions, at_least=0)
        if self.batch is not None:
            check.integer("batch", self.batch, at_least=1)
        for name in ("relative", "warm", "incremental", "widen"):
            value = getattr(self, name)
            check.expect(isinstance(value, bool), name, "True or False", type(value).__name__, TypeError)
        check.number("stop_loss", self.stop_loss)
        if self.stop_probability is not None:
            check.number("stop_probability", self.stop_probability, above=0)
            check.expect(self.stop_probability < 1, "stop_probability", "below 1", self.stop_probability)
        for name in ("weight_decay", "kl_weight", "after_weight", "end_weight"):
            check.number(name, getattr(self, name), at_least=0)
        for name in ("learning_rate", "clamp"):
            check.number(name, getattr(self, name), above=0)


@dataclass(frozen=True)
class Value:
    """The outcome of the optimisation.

    Attributes:
        keys: `[rows, in]` float32, the projection's inputs at the subject's last token, in every text with a
            target; the first is the bare prompt's.
        change: `[out]` float32, `δ`: by how much the projection's answer to them shall change.
        initial_norm: `‖v₀‖`, of its answer to the bare prompt's key, or the mean over all keys.
        losses: of every step, in which a text that was not computed counts as it was.
    """

    keys: torch.Tensor
    change: torch.Tensor
    initial_norm: float
    losses: list[float]

    def to(self, device: torch.device | str) -> Value:
        """The same on another device."""
        tensors = {
            name: part.to(device) for name, part in vars(self).items() if isinstance(part, torch.Tensor)
        }
        return replace(self, **tensors)


def value_groups(
    encoded: Sequence[EncodedEdit], options: ValueOptions, device: torch.device, fitting: int | None = None
) -> list[list[int]]:
    """Which edits to optimise side by side: those of like length.

    A CPU is busy with a few rows, and padding costs it more than a small batch does: there, unless a size is
    asked for, the stretch from the subject on, which every step runs, is of one length in a group. `fitting`:
    how many the device has room for.
    """
    padded = options.batch is not None or device.type != "cpu"
    size = options.batch or min(64 if padded else 6, fitting or 64)
    order = sorted(range(len(encoded)), key=lambda i: encoded[i].span)
    groups: list[list[int]] = []
    for _, run in itertools.groupby(order, key=lambda i: None if padded else encoded[i].span[0]):
        alike = list(run)
        # In groups of like size: a small one for what is left over would waste the device.
        count = math.ceil(len(alike) / size)
        bounds = [math.ceil(len(alike) * number / count) for number in range(count + 1)]
        groups += [alike[start:end] for start, end in itertools.pairwise(bounds)]
    return groups


def find_values(
    model: torch.nn.Module,
    projection: Projection,
    encoded: Sequence[EncodedEdit],
    options: ValueOptions,
    progress: Progress | None = None,
) -> list[Value | EngramError]:
    """Optimise the values of some edits, side by side; the model stays as it is.

    `δ` of an edit is added to the projection's output at the subject's last token, in every text of the edit
    and in "{subject} is a". It minimises (Meng et al. 2022, eq. 4, and code)

        mean −log p(target) + end_weight · mean −log p(its word ends) + kl_weight · KL(p ‖ p₀)
            + after_weight · mean KL(p ‖ p₀ after the target) + weight_decay · ‖δ‖ / ‖v₀‖²

    Each edit has its own `δ`, Adam state, clamp and end; those that have ended leave the batch. Of the steps
    that computed all of its texts, the `δ` of the smallest loss is kept.

    Args:
        model: in evaluation mode, float32, bfloat16 or float16; `δ` is float32 always.
        projection: the memory to be written.
        encoded: the edits.
        options: of the optimisation.
        progress: called with "values", the steps done and all steps, `options.steps` an edit and as many for
            each time that it goes on.

    Returns:
        The value of each edit, or what went wrong with it alone: a loss that is not finite.
    """
    device = input_device(model)
    search = functools.partial(
        _search, model, projection, list(encoded), options, progress or (lambda *_: None)
    )
    wide = _widened(model) if options.widen else {}
    dtype = torch.float32 if wide else projection.matrix.dtype
    with (
        only_states_learn(model), swapped_weights(model, wide), fast_attention(device, dtype),
        weights_read_again(model),
    ):  # fmt: skip
        if options.incremental:
            try:
                return search(incremental=True)
            except UnfitError as error:
                warnings.warn(f"{type(model).__name__} {error}: running it whole", stacklevel=2)
        return search(incremental=False)


def _search(
    model, projection, encoded, options, progress: Progress, *, incremental: bool
) -> list[Value | EngramError]:
    weights = options.kl_weight, options.after_weight, options.end_weight
    batch = EditBatch(encoded, input_device(model), *weights)
    try:
        recorded = record(model, projection, batch, incremental)
    except Exception as error:
        if not incremental:
            raise
        # Models with other memories than attention's ask a cache for what it has not.
        reason = f"cannot start from recorded states ({type(error).__name__}: {error})"
        raise UnfitError(reason) from error
    starts = recorded.values[batch.bare.to(recorded.values.device)]
    # What earlier edits changed for the subject counts as change.
    zero = torch.zeros_like(starts[0])
    offsets = torch.stack(
        [one.offset.to(zero) if options.relative and one.offset is not None else zero for one in encoded]
    )
    # Several facts need the room of as many changes in unlike directions.
    counts = [one.facts if options.relative else 1 for one in encoded]
    limits = options.clamp * starts.new_tensor(counts).sqrt()
    norms = starts.norm(dim=-1)
    # The last row of an edit is its KL prompt.
    sizes = [one.size for one in encoded]
    if options.relative:
        # A change is measured by the values as they were before any edit of the subject.
        pairs = zip(encoded, recorded.values.split(sizes), strict=True)
        norms = norms.new_tensor([one.norm or own[:-1].norm(dim=-1).mean().item() for one, own in pairs])
    deltas = [torch.zeros_like(start, requires_grad=True) for start in starts]
    scales = norms / starts.shape[-1] ** 0.5 if options.relative else torch.ones_like(norms)
    groups = [
        {"params": [delta], "lr": options.learning_rate * scale}
        for delta, scale in zip(deltas, scales.tolist(), strict=True)
    ]
    optimizer = torch.optim.Adam(groups)
    standing = Standing(Losses(model, projection, batch, recorded.context), options.stop_probability)
    losses: list[list[float]] = [[] for _ in encoded]
    failed: dict[int, EngramError] = {}
    lowest = [math.inf] * len(encoded)
    best: dict[int, torch.Tensor] = {}
    active = list(range(len(encoded)))
    ends, most = [options.steps] * len(encoded), options.steps * (1 + options.extensions)
    for step in itertools.count():
        with torch.enable_grad():
            delta = torch.stack(deltas)
            # The norm's own gradient at zero is zero, as a subgradient.
            decay = options.weight_decay * (delta + offsets).norm(dim=-1) / norms**2
        decays = decay.tolist()
        standing.look(delta, active)
        # What ends, or seems to be done by what some rows were before, is computed whole.
        ending = [
            i
            for i in active
            if step == ends[i] - 1 or standing.reached(i) or standing.loss(i) + decays[i] < options.stop_loss
        ]
        standing.look(delta, ending, whole=True)
        going = []
        for i in active:
            value = standing.loss(i) + decays[i]
            losses[i].append(value)
            if standing.fresh(i) and value < lowest[i]:
                lowest[i], best[i] = value, deltas[i].detach().clone()
            if not math.isfinite(value):
                text = encoded[i].edit.prompt_text
                why = "" if norms[i] else ": the projection answers 0, as an expert that does not get it"
                failed[i] = EngramError(f"model: expected a finite loss after {text!r}, got {value}{why}")
            elif value >= options.stop_loss and not standing.reached(i):
                if step == ends[i] - 1 and ends[i] < most and standing.asked(i) > MISSED:
                    ends[i] += options.steps
                    limits[i] *= 2
                if step < ends[i] - 1:
                    going.append(i)
        left = sum(ends[i] - step - 1 for i in going)
        progress("values", sum(ends) - left, sum(ends))
        if not going:
            break
        shrink = torch.autograd.grad(decay[going].sum(), [deltas[i] for i in going])
        gradients = [own + less for own, less in zip(standing.gradients(going), shrink, strict=True)]
        if options.warm and step == 0:
            with torch.no_grad():
                for i, gradient in zip(going, gradients, strict=True):
                    deltas[i].sub_(gradient * (losses[i][0] / gradient.square().sum()))
        else:
            for i, gradient in zip(going, gradients, strict=True):
                deltas[i].grad = gradient
            # Older ones count their steps on the caller's default device.
            with torch.device("cpu"):
                optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for i in going:
                whole = deltas[i] + offsets[i]
                whole *= (limits[i] * norms[i] / whole.norm()).clamp(max=1)
                deltas[i].copy_(whole - offsets[i])
        active = going
    keys = recorded.keys.split(sizes)
    return [
        failed.get(i)
        or Value(
            keys=keys[i][:-1],
            change=best[i],
            initial_norm=norms[i].item(),
            losses=losses[i],
        )
        for i in range(len(encoded))
    ]


@contextmanager
def only_states_learn(model: torch.nn.Module) -> Iterator[None]:
    """Freeze all parameters for a while, so that a backward pass ends at the lowest state that learns."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _widened(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The half-precision weights that this CPU has no units for, by name, as float32.

    None where there are quantised ones, which take states of the type that they were made for, or offloaded
    ones, which stay in their own.
    """
    units = {
        torch.bfloat16: torch.cpu._is_amx_tile_supported,
        torch.float16: getattr(torch.cpu, "_is_amx_fp16_supported", lambda: False),
    }
    if not all(is_plain(parameter) and not parameter.is_meta for parameter in model.parameters()):
        return {}
    return {
        name: parameter.data.float()
        for name, parameter in model.named_parameters()
        if parameter.device.type == "cpu" and parameter.dtype in units and not units[parameter.dtype]()
    }
