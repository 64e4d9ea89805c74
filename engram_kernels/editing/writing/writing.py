"""Write a batch of values into one layer, or spread over several (MEMIT, Meng et al. 2023, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ... import _checks as check
from ..._ranks import ALONE, Ranks
from ...errors import EngramError
from ...hf.hooks import Stop, capture, run_until
from ...hf.layers import decoder_layers
from ...hf.placement import input_device
from ...hf.projection import Projection
from ...hf.tokens import pad_rows
from ..search.batching import EncodedEdit
from ..search.partial_forward import adding
from ..search.values import Value
from .keys import MeanKey, SpreadKey
from .preconditioner import LayerOperator, Solved
from .records import Write, left_factor
from .weights import add_in_range

# Of a forward pass; and edits whose states are in memory at once.
ROWS = 64
EDITS = 256
# Tokens on either side of the subject's last one whose answers a key spares: farther ones hardly notice.
AROUND = 32
# Tokens that follow another name.
FOLLOWING = 4


def write_values(
    model: nn.Module,
    projections: Sequence[Projection],
    encoded: Sequence[EncodedEdit],
    values: Sequence[Value],
    operators: Mapping[int, LayerOperator],
    key: MeanKey | SpreadKey,
    edits: Sequence[int],
    bare_denominator: bool = False,
    ranks: Ranks = ALONE,
) -> list[Write]:
    """Write the changes of some edits, layer after layer, each of which takes its share of what is missing.

    For one layer the keys are those that the values were found with. For several, from the first to the last,

        R = (δ − what the last layer's output has changed by) / (layers that remain)
        W ← W + Rᵀ (λI + K Q Kᵀ)⁻¹ K Q

    Args:
        model: as it was when the values were found.
        projections: of the layers, the first one first; the values belong to the last, whose output adds
            up (`adds_up`) where there are several.
        encoded: the edits.
        values: of the edits.
        operators: by layer, `Q` as the method has it after the batches before.
        key: how the keys of an edit's texts become one.
        edits: the numbers of the edits, to be noted in the writes.
        bare_denominator: ROME as first published in code, for one layer: the answer to the bare prompt's key
            `B` is what changes, `W ← W + Eᵀ (B Rᵀ)⁻ᵀ R` with `R = K Q`.
        ranks: share the passes, and do the same writes.

    Returns:
        One write a layer; they are done.

    Raises:
        EngramError: the keys are dependent, a factor is not finite, or the weights leave their type's range.
    """
    residuals = torch.stack([value.change for value in values])
    if len(projections) == 1:
        (projection,) = projections
        operator = operators[projection.layer]
        keys = torch.stack(
            [
                _combined(model, projection, one, value.keys, key, operator, ranks)
                for one, value in zip(encoded, values, strict=True)
            ]
        )
        bare = torch.stack([value.keys[0] for value in values]) if bare_denominator else None
        return [_write(projection, encoded, keys, bare, residuals, operators, edits)]
    last = projections[-1]
    before, writes = None, []
    for number, projection in enumerate(projections):
        keys, hidden = _combined_states(model, projection, last, encoded, key, operators, ranks)
        before = hidden if before is None else before
        missing = (residuals.to(hidden) - (hidden - before)) / (len(projections) - number)
        keys, missing = keys.to(projection.matrix.device), missing.to(projection.matrix.device)
        writes.append(_write(projection, encoded, keys, None, missing, operators, edits))
    return writes


def _combined_states(
    model: nn.Module, projection: Projection, last: Projection, encoded, key, operators, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """The edits' keys `[edits, in]` and their states above the last layer `[edits, width]`.

    The states are means over the texts, under a `SpreadKey` plain ones: all texts shall answer alike, and its
    own shares are others in every layer. Those of all texts are many times as large, and are in memory for
    some edits at a time.
    """
    mean = key if isinstance(key, MeanKey) else MeanKey()
    operator = operators[projection.layer]
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start in range(0, len(encoded), EDITS):
        piece = encoded[start : start + EDITS]
        own, above = subject_states(model, projection, last, piece, ranks)
        for one, mine, over in zip(piece, own, above, strict=True):
            shares = mean.weights(_texts(one, mine, key), operator.current).to(over)
            found[0].append(_combined(model, projection, one, mine, key, operator, ranks))
            found[1].append(shares @ over[: len(shares)])
    return torch.stack(found[0]), torch.stack(found[1])


def _combined(
    model,
    projection: Projection,
    encoded: EncodedEdit,
    keys: Tensor,
    key: MeanKey | SpreadKey,
    operator: LayerOperator,
    ranks: Ranks,
) -> Tensor:
    """The one key of an edit `[in]` out of its texts' `[texts, in]`."""
    known = keys = _texts(encoded, keys, key)
    others = None if isinstance(key, MeanKey) else ranks.own(lambda: other_keys(model, projection, encoded))
    if others is not None:
        known = torch.cat([keys, others])
    return key.weights(keys, operator.current, others).to(keys) @ known


def _texts(encoded: EncodedEdit, keys: Tensor, key: MeanKey | SpreadKey) -> Tensor:
    """The keys of the texts that count: to the mean earlier facts do not."""
    return keys[: len(encoded.rewriting if isinstance(key, MeanKey) else encoded.rows)]


def _write(projection: Projection, encoded, keys, bare_keys, residuals, operators, edits) -> Write:
    """One joint write that changes the answer to every key by its residual."""
    matrix, operator = projection.whole(), operators[projection.layer]
    try:
        if bare_keys is None:
            solved = operator.factors(matrix, keys, residuals)
        else:
            right = operator.current.apply(keys.double()).float()
            solved = Solved(left_factor(bare_keys, right, residuals, 0.0), right, residuals, 0.0)
    except (EngramError, torch.linalg.LinAlgError) as error:
        if isinstance(error, EngramError) and not str(error).startswith("keys:"):
            raise
        raise EngramError(_dependent(encoded, keys.shape[1])) from error
    constrained = keys if bare_keys is None else bare_keys
    left, right = solved.left.float(), solved.right.float()
    if not (check.is_finite(left) and check.is_finite(right)):
        raise EngramError(f"edits: expected finite factors for {projection.name!r}, got NaN or infinity")
    add_in_range(projection, left, right)
    # In main memory, wherever the weights are: thousands of edits would fill a device.
    left, right, keys, wanted = (one.float().cpu() for one in (left, right, constrained, solved.residuals))
    return Write(projection.name, left, right, keys, wanted, solved.ridge, tuple(edits))


def _dependent(encoded: Sequence[EncodedEdit], width: int) -> str:
    if len(encoded) > width:
        return f"edits: expected at most {width} at once without a ridge, got {len(encoded)}"
    names = ", ".join(repr(one.edit.subject) for one in encoded[:3])
    more = f" and {len(encoded) - 3} others" if len(encoded) > 3 else ""
    return (
        "edits: expected subjects with linearly independent keys, or a ridge, got dependent ones among "
        f"{names}{more}"
    )


@torch.no_grad()
def other_keys(model: nn.Module, projection: Projection, encoded: EncodedEdit) -> Tensor:
    """The projection's inputs at the tokens that an edit's key shall spare, in the model as it is now.

    Returns:
        `[tokens, in]`, float32: of the edit's bare prompts up to `AROUND` tokens on either side of the
        subject's last one, the target's too; of those about other names the name's last one and `FOLLOWING`.
    """
    seen: list[Tensor] = []

    def see(_module, arguments, _keywords):
        seen.append(projection.inputs(arguments[0]))
        raise Stop

    # Of each row the tokens to read, and those to spare.
    rows: list[tuple[list[int], list[int]]] = []
    for row in encoded.bare:
        ids = row.ids[: row.subject + AROUND + 1]
        around = range(max(0, row.subject - AROUND), len(ids))
        rows.append((ids, [at for at in around if at != row.subject]))
    for row in encoded.others:
        ids = row.ids[: row.subject + FOLLOWING + 1]
        rows.append((ids, list(range(row.subject, len(ids)))))
    found = []
    with capture(before={projection.module: see}):
        for start in range(0, len(rows), ROWS):
            batch = rows[start : start + ROWS]
            ids, mask = pad_rows([tokens for tokens, _ in batch], input_device(model))
            seen.clear()
            run_until(model, input_ids=ids, attention_mask=mask)
            # Some models (OPT) flatten [rows, longest, width] before their MLP.
            states = seen[0].reshape(*ids.shape, -1)
            places = [(i, at) for i, (_, spared) in enumerate(batch) for at in spared]
            which, at = torch.tensor(places, device="cpu").T
            found.append(states[which, at].float())
    return torch.cat(found)


@torch.no_grad()
def subject_states(
    model: nn.Module,
    projection: Projection,
    last: Projection,
    encoded: Sequence[EncodedEdit],
    ranks: Ranks = ALONE,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The states at the subjects' last tokens, in the model as it is now; ranks share the passes.

    Returns:
        For each edit the projection's inputs `[texts, in]` and the output of the last layer `[texts, width]`,
        float32.
    """
    rows = [row for one in encoded for row in one.rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    device = input_device(model)
    found: dict[str, list[Tensor]] = {"keys": [], "hidden": []}
    widths = {"keys": projection.matrix.shape[1], "hidden": last.matrix.shape[0]}
    seen: dict[str, Tensor] = {}

    def see_keys(_module, arguments, _keywords):
        seen["keys"] = projection.inputs(arguments[0])

    def see_hidden(_module, _arguments, output):
        seen["hidden"] = output[0] if isinstance(output, tuple) else output
        raise Stop

    layer = decoder_layers(model)[1][last.layer]

    def observe() -> None:
        for number, start in enumerate(range(0, len(order), ROWS)):
            batch = order[start : start + ROWS]
            if number % ranks.size != ranks.rank:
                # The others' states are added to these.
                for name, width in widths.items():
                    found[name].append(torch.zeros(len(batch), width, device=projection.matrix.device))
                continue
            ids, mask = pad_rows([rows[i].ids for i in batch], device)
            run_until(model, input_ids=ids, attention_mask=mask)
            places = torch.tensor([(n, rows[i].subject) for n, i in enumerate(batch)], device="cpu").T
            for name, states in found.items():
                # Some models (OPT) flatten [rows, longest, width] before their MLP.
                states.append(seen[name].reshape(*ids.shape, -1)[tuple(places)].float())

    with capture(before={projection.module: see_keys}, after={layer: see_hidden}):
        ranks.own(observe)
    # Back into the order of the rows.
    back, counts = torch.tensor(order, device="cpu").argsort(), [len(one.rows) for one in encoded]
    keys, hidden = (ranks.sum_(torch.cat(states))[back].split(counts) for states in found.values())
    return keys, hidden


@torch.no_grad()
def adds_up(model: nn.Module, projection: Projection, encoded: EncodedEdit) -> bool:
    """Whether a change of the projection's output is the same change of its layer's output.

    Where a norm or a factor stands between them, layers cannot share a change by equal parts.
    """
    bare = replace(encoded, rewriting=encoded.rewriting[:1], held=[])
    device = projection.matrix.device
    generator = torch.Generator().manual_seed(0)
    width = projection.matrix.shape[0]
    change = torch.randn(1, width, generator=generator, device="cpu", dtype=torch.float32).to(device)
    where = torch.tensor([bare.rewriting[0].subject], device=device)
    states = []
    for delta in (torch.zeros_like(change), change):
        with adding(projection, delta, where):
            states.append(subject_states(model, projection, projection, [bare])[1][0][0])
    change = change[0].to(states[0])
    off = (states[1] - states[0] - change).abs()
    room = 1e-3 + 8 * torch.finfo(projection.matrix.dtype).eps * (1 + states[0].abs() + change.abs())
    return bool((off <= room).all())
