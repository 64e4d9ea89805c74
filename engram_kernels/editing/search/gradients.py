"""Keys and gradients of edits at every layer that is written, in one forward and one backward pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import _checks as check
from ...errors import EngramError
from ...hf.attention import fast_attention
from ...hf.forward import logits_at
from ...hf.hooks import capture
from ...hf.placement import input_device
from ...hf.projection import Projection
from ...hf.tokens import Row, pad_rows
from .batching import EncodedEdit
from .values import only_states_learn

# Of a forward and backward pass.
ROWS = 32
TOKENS = ("subject", "ends", "all")


@dataclass(frozen=True)
class GradientOptions:
    """How edits are written by gradients of their loss, instead of a value that is searched.

    Args:
        tokens: whose keys are written: the subject's last token (`"subject"`), that and those that predict
            the target (`"ends"`), or every token (`"all"`).
        rate: `η` of UltraEdit's rule, `E = −η ‖k̂‖² ĝ`, with keys and gradients normalised over the stream so
            far (Gu et al. 2025, arXiv 2505.14679). None: the smallest change, in the metric of `Q`, that
            lowers each loss to `loss` as far as gradients tell.
        loss: `−log p(target)` to reach, where there is no rate.
        passes: how often gradients are asked for, each time where the last write led.

    Raises:
        TypeError, ValueError: an option is of the wrong kind or out of range.
    """

    tokens: str = "ends"
    rate: float | None = None
    loss: float = 0.3
    passes: int = 4

    def __post_init__(self):
        check.expect(self.tokens in TOKENS, "tokens", f"one of {', '.join(TOKENS)}", repr(self.tokens))
        if self.rate is not None:
            check.number("rate", self.rate, above=0)
        check.number("loss", self.loss, above=0)
        check.integer("passes", self.passes, at_least=1)
        alone = self.rate is None or self.passes == 1
        check.expect(alone, "passes", "1 with a rate, as UltraEdit has it", self.passes)


@dataclass(frozen=True)
class Gradients:
    """What a pass saw; tokens of all edits are beside each other.

    Attributes:
        keys: `[tokens, in]` a layer, float32.
        gradients: `[tokens, out]` a layer, float32, of each edit's own loss; empty without a backward pass.
        answers: `[edits, out]`, the last layer's answer to the subject after the bare prompt.
        owner: `[tokens]`, the index of each token's edit.
        bare: `[edits]`, which of the tokens is the bare prompt's subject.
        losses: `[edits]` float64, `mean −log p(target)` over an edit's texts.
    """

    keys: list[Tensor]
    gradients: list[Tensor]
    answers: Tensor
    owner: Tensor
    bare: Tensor
    losses: Tensor


def layer_gradients(
    model: nn.Module,
    projections: Sequence[Projection],
    encoded: Sequence[EncodedEdit],
    tokens: str,
    backward: bool = True,
) -> Gradients:
    """Run some edits' texts, and see keys and gradients at the written layers.

    Args:
        model: in evaluation mode.
        projections: of the layers, the lowest first.
        encoded: the edits.
        tokens: which are seen: one of `TOKENS`.
        backward: whether to ask for gradients.

    Raises:
        EngramError: a loss is not finite, or gradients do not pass through the model.
    """
    device = input_device(model)
    rows = [(number, row) for number, one in enumerate(encoded) for row in one.rows]
    rows.sort(key=lambda pair: len(pair[1].ids))
    parts = []
    fast = fast_attention(device, projections[-1].matrix.dtype)
    with only_states_learn(model), fast, torch.set_grad_enabled(backward):
        for start in range(0, len(rows), ROWS):
            parts.append(_Pass(projections, encoded, rows[start : start + ROWS], tokens, device))
            parts[-1].run(model, backward)
    bare, at = torch.zeros(len(encoded), dtype=torch.int64, device="cpu"), 0
    answers = torch.zeros(len(encoded), projections[-1].matrix.shape[0], device="cpu")
    losses = torch.zeros(len(encoded), dtype=torch.float64, device="cpu")
    for part in parts:
        for number, place in part.bare.items():
            bare[number], answers[number] = at + place, part.answers[place]
        losses.index_add_(0, part.owners, part.losses)
        at += len(part.owner)
    for one, loss in zip(encoded, losses.tolist(), strict=True):
        if not math.isfinite(loss):
            raise EngramError(f"model: expected a finite loss after {one.edit.prompt_text!r}, got {loss}")
    layers = range(len(projections))
    return Gradients(
        keys=[torch.cat([part.keys[layer] for part in parts]) for layer in layers],
        gradients=[torch.cat([part.gradients[layer] for part in parts]) for layer in layers if backward],
        answers=answers,
        owner=torch.tensor([number for part in parts for number in part.owner], device="cpu"),
        bare=bare,
        losses=losses,
    )


class _Pass:
    """Some rows of some edits, as one batch: places first, and what was seen there after `run`."""

    def __init__(self, projections, encoded, rows: list[tuple[int, Row]], tokens: str, device: torch.device):
        self.projections = projections
        self.ids, self.mask = pad_rows([row.inputs for _, row in rows], device)
        width = self.ids.shape[1]
        # By token: whose it is, and where in the flattened batch; and of each edit's bare prompt the subject.
        self.owner: list[int] = []
        self.bare: dict[int, int] = {}
        self.flat: list[int] = []
        # By target token: in which row it is predicted, and where, and its share in its edit's loss.
        lines, columns, labels, owners, shares = [], [], [], [], []
        for line, (number, row) in enumerate(rows):
            one = encoded[number]
            for at in places(row, tokens):
                if at == row.subject and row is one.rewriting[0]:
                    self.bare[number] = len(self.owner)
                self.owner.append(number)
                self.flat.append(line * width + at)
            for at in range(row.target, len(row.ids)):
                lines.append(line)
                columns.append(at - 1)
                labels.append(row.ids[at])
                owners.append(number)
                shares.append(1.0 / (len(one.rows) * (len(row.ids) - row.target)))
        self.places = torch.tensor(lines, device=device), torch.tensor(columns, device=device)
        self.labels = torch.tensor(labels, device=device)
        self.owners = torch.tensor(owners, device="cpu")
        self.shares = torch.tensor(shares, device=device)
        self.keys: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.answers = self.losses = torch.empty(0)
        self._outputs: list[Tensor] = []

    def run(self, model: nn.Module, backward: bool) -> None:
        """See keys, the last layer's answers, losses, and with a backward pass gradients."""
        hooks = {one.module: functools.partial(self._see, one, backward) for one in self.projections}
        with capture(after=hooks):
            inputs = {"input_ids": self.ids, "attention_mask": self.mask, "use_cache": False}
            logits = logits_at(model, *self.places, **inputs)
        each = F.cross_entropy(logits.float(), self.labels.to(logits.device), reduction="none")
        each = each * self.shares.to(each)
        self.losses = each.detach().cpu().double()
        self.answers = self._tokens(self._outputs[-1].detach()).cpu()
        if backward:
            if not each.requires_grad:
                raise EngramError(
                    "model: expected one that gradients pass through, got one of whose layers some stop them "
                    "(quantised activations do): make the edit on the model in full precision"
                )
            self.gradients = list(map(self._tokens, torch.autograd.grad(each.sum(), self._outputs)))
        self._outputs = []

    def _see(self, projection: Projection, backward: bool, _module, arguments, output: Tensor) -> Tensor:
        self.keys.append(self._tokens(projection.inputs(arguments[0]).detach()))
        if backward and not self._outputs:
            # Where the graph begins: nothing below is learnt.
            output = output.detach().requires_grad_()
        self._outputs.append(output)
        return output

    def _tokens(self, states: Tensor) -> Tensor:
        """The states of the tokens, `[tokens, width]`; some models (OPT) flatten theirs before the MLP."""
        states = states.reshape(-1, states.shape[-1])
        return states[torch.tensor(self.flat, device=states.device)].float()


def places(row: Row, tokens: str) -> list[int]:
    """The positions of a text whose keys are written."""
    if tokens == "subject":
        return [row.subject]
    if tokens == "ends":
        return sorted({row.subject, *range(row.target - 1, len(row.inputs))})
    return list(range(len(row.inputs)))


@dataclass(frozen=True)
class Stream:
    """Mean and deviation of all rows so far, of keys and gradients beside each other.

    Attributes:
        count: of rows.
        mean: `[in + out]` float64.
        squares: `[in + out]` float64, the sum of squared distances from the mean.

    Source: Gu et al. 2025 (arXiv 2505.14679), lifelong normalisation; the update is Chan, Golub and LeVeque's
        of 1983.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def begin(cls, width: int, device: torch.device) -> Stream:
        """Of no rows."""
        zeros = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(0, zeros, zeros)

    def after(self, rows: Tensor) -> Stream:
        """With some rows `[n, in + out]` more."""
        rows = rows.double()
        count = self.count + len(rows)
        mean, apart = rows.mean(0), rows.mean(0) - self.mean
        squares = (rows - mean).square().sum(0) + apart.square() * (self.count * len(rows) / count)
        return Stream(count, self.mean + apart * (len(rows) / count), self.squares + squares)

    def normalised(self, rows: Tensor) -> Tensor:
        """Rows in units of the deviation from the mean; what never deviates is 0.

        Raises:
            EngramError: there was one row alone.
        """
        if self.count < 2:
            raise EngramError(
                "values: expected two tokens so far by which gradients are normalised, got one: give more "
                "edits, or search"
            )
        deviation = (self.squares / (self.count - 1)).sqrt()
        scaled = (rows.double() - self.mean) / (deviation + torch.finfo(torch.float32).eps)
        return torch.where(deviation > 0, scaled, 0.0)

    def tensor(self) -> Tensor:
        """All of it as one tensor, `[1 + 2 (in + out)]` float64."""
        return torch.cat([self.mean.new_tensor([self.count]), self.mean, self.squares])

    @classmethod
    def of(cls, tensor: Tensor) -> Stream:
        """What `tensor` gave."""
        mean, squares = tensor[1:].chunk(2)
        return cls(int(tensor[0]), mean, squares)
