"""Training the values at a graft's positions, on small random models."""

import copy

import model_zoo
import pytest
import torch
from editing_helpers import changed, weights
from grafting_helpers import language_batches, some_graft

from engram_kernels import EngramError
from engram_kernels.grafting import Graft


def reference(model, graft, batches, steps, lr):
    """Adam on dense weights, of whose gradients all but the graft's positions are zeroed."""
    other = copy.deepcopy(model)
    graft.apply(other)
    chosen = {name: other.get_parameter(name) for name in graft.indices}
    optimizer = torch.optim.Adam(chosen.values(), lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps) + lr / steps * (step / steps)
        optimizer.zero_grad()
        other(**batches[step % len(batches)]).loss.backward()
        for name, weight in chosen.items():
            kept = torch.zeros(weight.numel())
            at = graft.indices[name].long()
            kept[at] = weight.grad.view(-1)[at]
            weight.grad.copy_(kept.view(weight.shape))
        optimizer.step()
    return {name: other.get_parameter(name).detach().view(-1)[graft.indices[name].long()] for name in chosen}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_refit_is_adam_at_the_grafts_positions(family):
    model, batches = model_zoo.small_model(family), language_batches()
    graft = some_graft(model, count=80)
    expected = reference(model, graft, batches, 6, 1e-2)
    found = graft.refit(model, batches, steps=6, lr=1e-2)
    assert found.indices.keys() == graft.indices.keys()
    for name, at in graft.indices.items():
        assert torch.equal(found.indices[name], at)
        # Adam divides a gradient by its own size: where it is next to 0, rounding decides.
        torch.testing.assert_close(found.values[name], expected[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refit_fits_and_leaves_the_model_as_it_was(dtype):
    model, batches = model_zoo.small_model(dtype=dtype), language_batches(1)
    model.requires_grad_(False)
    first = next(model.parameters())
    first.requires_grad_(True)
    first.grad = torch.ones_like(first)
    before, graft, calls = weights(model), some_graft(model, count=200), []
    kept = {name: value.clone() for name, value in graft.values.items()}
    found = graft.refit(model, batches, steps=30, lr=1e-2, progress=lambda *call: calls.append(call))
    assert calls[-1] == ("refit", 30, 30) and len(calls) == 30
    assert not changed(before, model)
    assert [p.requires_grad for p in model.parameters()].count(True) == 1 and first.grad.eq(1).all()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert all(torch.equal(graft.values[name], value) for name, value in kept.items())
    assert all(value.dtype == dtype for value in found.values.values())
    assert found.recipe["refit"] == {"steps": 30, "lr": 1e-2}
    with torch.no_grad(), found.apply(model):
        assert model(**batches[0]).loss.item() < found.metrics["first_loss"] - 0.05


def test_refit_of_two_skills_in_one_graft():
    model, (one, two) = model_zoo.small_model(), language_batches(2)
    both = Graft.merge([some_graft(model, seed=1, count=100), some_graft(model, seed=2, count=100)])
    found = both.refit(model, [one, two], steps=40, lr=1e-2)
    assert found.overlap(both).jaccard == 1 and found.recipe["method"] == "average"

    def loss(batch):
        with torch.no_grad():
            return model(**batch).loss.item()

    with both.apply(model):
        before = loss(one), loss(two)
    with found.apply(model):
        assert all(new < old - 0.02 for new, old in zip((loss(one), loss(two)), before, strict=True))


def test_refit_gives_the_model_back_after_errors():
    model, batches = model_zoo.small_model(), language_batches()
    graft, before = some_graft(model), weights(model)
    seen = []

    def poisoned(model, batch):
        seen.append(0)
        weight = model.get_parameter(next(iter(graft.indices)))
        return model(**batch).loss + (0.0 if len(seen) < 3 else (weight.flatten() * float("inf")).sum() * 0)

    with pytest.raises(EngramError, match="loss_fn: expected a finite loss, got nan"):
        graft.refit(model, batches, poisoned)
    assert len(seen) == 3 and not changed(before, model)

    def steep(model, batch):
        weight = model.get_parameter(next(iter(graft.indices)))
        return model(**batch).loss + (weight - weight.detach()).abs().sqrt().sum()

    with pytest.raises(EngramError, match="loss_fn: expected finite gradients, got NaN or infinity in"):
        graft.refit(model, batches, steep)
    assert not changed(before, model)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"lr": 0.0}, "lr: expected a finite number above 0, got 0"),
        ({"batches": []}, "batches: expected at least one"),
        ({"loss_fn": lambda model, batch: torch.ones(())}, "loss_fn: expected a loss that depends"),
    ],
)
def test_bad_input(arguments, message):
    model = model_zoo.small_model()
    graft, before = some_graft(model), weights(model)
    with pytest.raises((ValueError, EngramError), match=message):
        graft.refit(model, **{"batches": language_batches(), **arguments})
    assert not changed(before, model)


@pytest.mark.parametrize(("count", "expected"), [(50, 0.01), (20_000, 0.3 * 20_000**-0.5)])
def test_the_rate_falls_where_many_values_move(count, expected):
    model = model_zoo.small_model()
    found = some_graft(model, count=count).refit(model, language_batches(1), steps=1)
    assert found.recipe["refit"] == {"steps": 1, "lr": expected}


def test_another_base_is_refused():
    graft = some_graft(model_zoo.small_model())
    with pytest.raises(EngramError, match="the weights that the graft was made for"):
        graft.refit(model_zoo.small_model(seed=3), language_batches())
    empty = Graft({}, {}, {}, {})
    with pytest.raises(ValueError, match="positions, whose values are refitted"):
        empty.refit(model_zoo.small_model(), language_batches())
