"""Which rows of a search are computed at which step, and what the others count as meanwhile."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

import model_zoo
import torch

from engram_kernels.editing import Edit
from engram_kernels.editing.search import standing as standing_module
from engram_kernels.editing.search.batching import EditBatch, encode_edit
from engram_kernels.editing.search.losses import Losses
from engram_kernels.editing.search.partial_forward import record
from engram_kernels.editing.search.standing import Standing
from engram_kernels.editing.search.values import ValueOptions, find_values
from engram_kernels.hf.projection import output_projection

WANTED = 0.5


class Squares:
    """Losses `‖δ − goal‖²` of rows; those of `easy` are as likely as wanted."""

    def __init__(self, edits: int, rows: int, easy: set[int]):
        edit = SimpleNamespace(size=rows, firsts=[0])
        self.batch = SimpleNamespace(edits=[edit] * edits, rows=[None] * (edits * rows))
        self.goals = torch.arange(edits * rows * 2.0).view(-1, 2)
        self.easy, self.asked = easy, []

    def of(self, delta, chosen):
        self.asked.append(chosen)
        loss = (delta - self.goals[chosen]).square().sum(-1)
        missing = torch.tensor([0.0 if row in self.easy else 9.0 for row in chosen])
        return loss, missing, missing


def gradient(losses: Squares, row: int, delta: torch.Tensor) -> torch.Tensor:
    return 2 * (delta - losses.goals[row])


def test_rows_that_do_not_fall_short_are_computed_at_one_step_in_four():
    """Again at the second, as the first has δ = 0; a KL prompt, an edit's last row, with any other of it."""
    losses = Squares(edits=2, rows=3, easy={1, 2, 3, 4, 5})
    standing = Standing(losses, WANTED)
    for _ in range(7):
        standing.look(torch.zeros(2, 2), [1, 0])
        standing.gradients([0, 1])
    every = [0, 1, 2, 3, 4, 5]
    assert losses.asked == [every, every, [0, 2], [0, 2], [0, 2], every, [0, 2]]


def test_no_row_rests_where_nothing_is_wanted():
    losses = Squares(edits=1, rows=3, easy={0, 1, 2})
    standing = Standing(losses, None)
    for _ in range(3):
        standing.look(torch.zeros(1, 2), [0])
        assert standing.fresh(0) and not standing.reached(0)
        standing.gradients([0])
    assert losses.asked == [[0, 1, 2]] * 3


def test_a_row_at_rest_counts_as_it_was_until_all_are_computed():
    losses = Squares(edits=1, rows=3, easy={1, 2})
    standing = Standing(losses, WANTED)
    steps = [torch.tensor([[value, -value]]) for value in (0.0, 1.0, 3.0)]

    def loss(*deltas):
        pairs = enumerate(deltas)
        return float(sum((delta[0] - losses.goals[row]).square().sum() for row, delta in pairs))

    for delta in steps[:2]:
        standing.look(delta, [0])
        assert standing.fresh(0) and standing.loss(0) == loss(delta, delta, delta)
        (found,) = standing.gradients([0])
        assert torch.equal(found, sum(gradient(losses, row, delta[0]) for row in range(3)))
    _, before, now = steps
    standing.look(now, [0])
    assert not standing.fresh(0) and standing.loss(0) == loss(now, before, now)
    standing.look(now, [0], whole=True)
    # Those that had been computed at this step are not computed again.
    assert losses.asked[2:] == [[0, 2], [1]]
    assert standing.fresh(0) and standing.loss(0) == loss(now, now, now)
    (found,) = standing.gradients([0])
    assert torch.equal(found, sum(gradient(losses, row, now[0]) for row in range(3)))


def test_edits_stand_by_themselves():
    losses = Squares(edits=3, rows=2, easy={2, 3})
    standing = Standing(losses, WANTED)
    delta = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    standing.look(delta, [0, 2])
    assert losses.asked == [[0, 1, 4, 5]]
    assert math.isinf(standing.loss(1)) and not standing.reached(1)
    standing.look(delta, [1])
    assert standing.reached(1) and not standing.reached(2) and standing.asked(2) == 9.0
    found = standing.gradients([2, 1])
    for edit, own in zip((2, 1), found, strict=True):
        rows = (2 * edit, 2 * edit + 1)
        assert torch.equal(own, sum(gradient(losses, row, delta[edit]) for row in rows))


def texts_of(model):
    edits = [Edit("The Eiffel Tower", "{} is in", "Rome"), Edit("Zürich", "I know that {} lies in", "Brazil")]
    tokenizer = model_zoo.byte_level_tokenizer()
    return [encode_edit(model, tokenizer, edit, ("maps", "She and he", "Therefore")) for edit in edits]


@pytest.mark.parametrize("weights", [(0.5, 0.0, 0.0), (0.5, 2.0, 0.0), (0.5, 2.0, 0.25)])
@pytest.mark.parametrize("incremental", [True, False])
def test_some_rows_are_what_they_are_among_all(incremental, weights):
    model = model_zoo.small_model("llama")
    projection = output_projection(model, 1)
    batch = EditBatch(texts_of(model), torch.device("cpu"), *weights)
    losses = Losses(model, projection, batch, record(model, projection, batch, incremental).context)
    rows = list(range(len(batch.rows)))
    losses.of(torch.zeros(len(rows), projection.matrix.shape[0]), rows)
    delta = torch.randn(len(rows), projection.matrix.shape[0], generator=torch.Generator().manual_seed(0))

    def of(chosen):
        change = delta[chosen].requires_grad_()
        found = losses.of(change, chosen)
        return *found, torch.autograd.grad(found[0].sum(), change)[0]

    whole = of(rows)
    for chosen in ([0], [4], [2, 9], [1, 3, 5, 8], rows[:-1]):
        for some, every in zip(of(chosen), whole, strict=True):
            torch.testing.assert_close(some, every[chosen], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_reached_changes_no_step():
    model = model_zoo.small_model("llama")
    projection, texts = output_projection(model, 1), texts_of(model)
    options = ValueOptions(steps=8, learning_rate=0.5, kl_weight=1.0, stop_loss=0.0, after_weight=0.5)
    plain = find_values(model, projection, texts, options)
    found = find_values(model, projection, texts, dataclasses.replace(options, stop_probability=0.99))
    for one, other in zip(plain, found, strict=True):
        assert one.losses == other.losses and torch.equal(one.change, other.change)


def computed_rows(monkeypatch, rest, search):
    """How many rows a search computes that lets them rest for so long, and what it finds."""
    counts, of = [], Losses.of

    def counted(self, delta, chosen):
        counts.append(len(chosen))
        return of(self, delta, chosen)

    with monkeypatch.context() as patch:
        patch.setattr(standing_module, "REST", rest)
        patch.setattr(Losses, "of", counted)
        found = search()
    return sum(counts), found


def test_a_search_that_lets_rows_rest_ends_where_all_are_reached(monkeypatch):
    """And computes fewer of them; one that lets none rest does what the steps without a bound do."""
    model = model_zoo.small_model("llama")
    projection, texts = output_projection(model, 1), texts_of(model)
    # A random model cannot be brought to say much.
    wanted = math.exp(-6.75)
    options = ValueOptions(
        steps=60, learning_rate=0.1, clamp=200.0, weight_decay=0.0, stop_loss=0.0, stop_probability=wanted
    )

    def search(options=options):
        return find_values(model, projection, texts, options)

    every, exact = computed_rows(monkeypatch, 1, search)
    fewer, found = computed_rows(monkeypatch, 4, search)
    assert fewer < 0.9 * every
    steps = max(len(value.losses) for value in exact)
    plain = search(dataclasses.replace(options, stop_probability=None, steps=steps))
    for one, other in zip(exact, plain, strict=True):
        assert one.losses == pytest.approx(other.losses[: len(one.losses)], rel=1e-5)

    batch = EditBatch(texts, torch.device("cpu"), options.kl_weight)
    losses = Losses(model, projection, batch, record(model, projection, batch, True).context)
    rows = list(range(len(batch.rows)))
    losses.of(torch.zeros(len(rows), 1).expand(-1, found[0].change.numel()), rows)
    changes = torch.stack([value.change for value in found])[batch.owner]
    loss, missing, _ = losses.of(changes, rows)
    assert (missing < -math.log(wanted)).all() and all(len(value.losses) < 60 for value in found)
    # The last loss is of one δ.
    for number, value in enumerate(found):
        assert value.losses[-1] == pytest.approx(loss[batch.owner == number].sum().item(), rel=1e-4)
