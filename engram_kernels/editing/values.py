"""The key and the value of an edit: what the layer sees, and what it shall answer (ROME, eq. 3 and 4)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch

from .. import _checks as check
from ..errors import EngramError
from .structure import Projection
from .tokens import Edit, Row, check_length, encode_row, pad_rows


@dataclass(frozen=True)
class ValueOptions:
    """How the value of an edit is optimised.

    Args:
        steps: of Adam, at most.
        learning_rate: of Adam.
        clamp: the change of the value is kept within `clamp` times the norm of the value it starts from.
        weight_decay: weight of `‖δ‖ / ‖v₀‖²` in the loss.
        kl_weight: weight of the divergence of the answer to "{subject} is a" from the unedited model's.
        stop_loss: optimisation ends when the loss is below this.

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

    def __post_init__(self):
        integer = isinstance(self.steps, int) and not isinstance(self.steps, bool)
        check.expect(integer, "steps", "an integer", type(self.steps).__name__, TypeError)
        for field in fields(self):
            check.number(field.name, getattr(self, field.name))
        for name in ("steps", "learning_rate", "clamp"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        for name in ("weight_decay", "kl_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Value:
    """The outcome of the optimisation.

    Attributes:
        keys: `[contexts, in]` float32, the inputs of the projection at the subject's last token: first in the
            bare prompt, then after each prefix.
        change: `[out]` float32, `δ`: by how much the projection's answer to the key shall change.
        initial_norm: of its answer `v₀` to the bare key.
        losses: of every step.
    """

    keys: torch.Tensor
    change: torch.Tensor
    initial_norm: float
    losses: list[float]


def find_value(
    model: torch.nn.Module,
    tokenizer,
    projection: Projection,
    edit: Edit,
    prefixes: list[str],
    options: ValueOptions,
    progress: Callable[[int, int], None] | None = None,
) -> Value:
    """Optimise the value of one edit; the model stays as it is.

    `δ` is added to the projection's output at the subject's last token, in the prompt itself, in the prompt
    after each prefix, and in "{subject} is a". It minimises (Meng et al. 2022, eq. 4, and their code)

        mean −log p(target) + kl_weight · KL(p₀ ‖ p) + weight_decay · ‖δ‖ / ‖v₀‖²

    Args:
        model: in evaluation mode, float32, bfloat16 or float16; `δ` is float32 always.
        tokenizer: of the model.
        projection: the memory to be written.
        edit: the fact.
        prefixes: texts to put before the prompt.
        options: of the optimisation.
        progress: called with the steps done and their largest number.

    Raises:
        EngramError: the loss is not finite, the subject or target has no token, or the prompt is longer than
            the model's context.
    """
    rewriting = []
    for prefix in ["", *(f"{prefix}. " for prefix in prefixes)]:
        row = encode_row(tokenizer, edit.subject, edit.prompt, edit.target, prefix)
        rewriting.append(check_length(model, row, edit, prefix))
    essence = check_length(model, encode_row(tokenizer, edit.subject, "{} is a"), edit)
    batch = _Batch(rewriting, essence, model.get_input_embeddings().weight.device)
    device = projection.matrix.device
    subjects = batch.subjects.to(device)
    delta = torch.zeros(projection.matrix.shape[0], dtype=torch.float32, device=device, requires_grad=True)
    seen: dict[str, torch.Tensor] = {}

    def add_delta(_module, inputs, output):
        # Some models (OPT) flatten [rows, longest, width] before their MLP.
        flat = output.reshape(-1, output.shape[-1])
        if not seen:
            seen["keys"] = inputs[0].reshape(-1, inputs[0].shape[-1])[subjects].detach().float()
            seen["value"] = flat[subjects[0]].detach().float()
        # Out of place: the backward pass may need the output as it was.
        change = delta.to(output.dtype).expand(len(subjects), -1)
        return flat.index_put((subjects,), change, accumulate=True).view_as(output)

    optimizer = torch.optim.Adam([delta], lr=options.learning_rate)
    losses: list[float] = []
    unedited: torch.Tensor | None = None
    with _only_delta_learns(model), torch.enable_grad():
        hook = projection.module.register_forward_hook(add_delta)
        try:
            for step in range(options.steps):
                target_log_probabilities, essence_log_probabilities = batch.log_probabilities(model)
                if unedited is None:
                    unedited = essence_log_probabilities.detach()
                initial_norm = seen["value"].norm()
                nll = -target_log_probabilities.mean()
                kl = torch.nn.functional.kl_div(
                    essence_log_probabilities, unedited, log_target=True, reduction="sum"
                )
                decay = delta.norm() / initial_norm**2
                loss = nll + options.kl_weight * kl + options.weight_decay * decay.to(nll.device)
                losses.append(loss.item())
                if not torch.isfinite(loss):
                    raise EngramError(f"model: expected a finite loss after {edit.text!r}, got {losses[-1]}")
                if progress:
                    progress(step + 1, options.steps)
                if losses[-1] < options.stop_loss or step == options.steps - 1:
                    break
                (delta.grad,) = torch.autograd.grad(loss, [delta])
                optimizer.step()
                with torch.no_grad():
                    delta *= (options.clamp * initial_norm / delta.norm()).clamp(max=1)
        finally:
            hook.remove()
    return Value(
        keys=seen["keys"][: len(rewriting)],
        change=delta.detach(),
        initial_norm=initial_norm.item(),
        losses=losses,
    )


class _Batch:
    """The rewriting rows and the essence row as one padded batch, and where its predictions are read."""

    def __init__(self, rewriting: list[Row], essence: Row, device):
        rows = [*rewriting, essence]
        self.ids, self.mask = pad_rows([row.ids for row in rows], device)
        # Positions among all tokens of the batch, row after row.
        self.subjects = torch.tensor([i * self.ids.shape[1] + row.subject for i, row in enumerate(rows)])
        # A token is predicted one position earlier.
        places = [
            (i, position - 1)
            for i, row in enumerate(rewriting)
            for position in range(row.target, len(row.ids))
        ]
        self.labels = torch.tensor([rewriting[i].ids[position + 1] for i, position in places], device=device)
        self.shares = torch.tensor(
            [1.0 / (len(rewriting[i].ids) - rewriting[i].target) for i, _ in places], device=device
        )
        places.append((len(rewriting), len(essence.ids) - 1))
        self.rows = torch.tensor([row for row, _ in places], device=device)
        self.kept = torch.tensor(sorted({position for _, position in places}), device=device)
        self.places = torch.searchsorted(
            self.kept, torch.tensor([position for _, position in places], device=device)
        )
        self.count = len(rewriting)

    def log_probabilities(self, model) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of the target (its tokens' mean) `[rows]`, and of every token after the essence."""
        keep = (
            {"logits_to_keep": self.kept}
            if "logits_to_keep" in inspect.signature(model.forward).parameters
            else {}
        )
        logits = model(input_ids=self.ids, attention_mask=self.mask, use_cache=False, **keep).logits.to(
            self.ids.device
        )
        if not keep:
            logits = logits[:, self.kept]
        predictions = logits[self.rows, self.places].float().log_softmax(-1)
        chosen = predictions[:-1].gather(-1, self.labels[:, None])[:, 0] * self.shares
        means = torch.zeros(self.count, device=chosen.device).index_add(0, self.rows[:-1], chosen)
        return means, predictions[-1]


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


@torch.no_grad()
def target_log_probability(model: torch.nn.Module, tokenizer, edit: Edit) -> float:
    """`log p(target | prompt)`, the sum over the target's tokens.

    Raises:
        EngramError: the model predicts NaN, or the prompt is longer than its context.
    """
    row = check_length(model, encode_row(tokenizer, edit.subject, edit.prompt, edit.target), edit)
    device = model.get_input_embeddings().weight.device
    ids, mask = pad_rows([row.ids], device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, row.target - 1 : -1].float()
    labels = ids[0, row.target :].to(logits.device)
    total = logits.log_softmax(-1).gather(-1, labels[:, None]).sum().item()
    if math.isnan(total):
        raise EngramError(f"model: expected finite predictions after {edit.text!r}, got NaN")
    return total
