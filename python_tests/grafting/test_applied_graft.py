"""Grafts that come and go in a model, bit for bit."""

import copy

import model_zoo
import pytest
import torch
from editing_helpers import changed, weights
from grafting_helpers import some_graft, tuned

from engram_kernels import EngramError
from engram_kernels.grafting import GraftSwitch, graftable_parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_and_undo_a_thousand_times(dtype):
    model = model_zoo.small_model(dtype=dtype)
    graft = some_graft(model)
    before = weights(model)
    switch = GraftSwitch(model, {"a": graft, "b": some_graft(model, seed=2)})
    for _ in range(500):
        switch.use("a")
        switch.use("b")
        switch.use(None)
    assert not changed(before, model)
    with graft.apply(model) as applied:
        assert applied.applied
        for name, at in graft.indices.items():
            assert torch.equal(model.get_parameter(name).detach().reshape(-1)[at.long()], graft.values[name])
    assert not applied.applied
    assert not changed(before, model)


def test_weights_in_another_order_of_memory():
    """As a model has them that shares a matrix, transposed, with something else."""
    model = model_zoo.small_model()
    graft = some_graft(model)
    for name in graft.indices:
        weight = model.get_parameter(name)
        weight.data = weight.data.T.contiguous().T
    assert not all(model.get_parameter(name).is_contiguous() for name in graft.indices)
    before = weights(model)
    with graft.apply(model):
        for name, at in graft.indices.items():
            assert torch.equal(model.get_parameter(name).detach().reshape(-1)[at.long()], graft.values[name])
    assert not changed(before, model)


def test_moved_and_converted_models_are_noticed():
    model = model_zoo.small_model()
    graft = some_graft(model)
    applied = graft.apply(model)
    switch = GraftSwitch(model, {"a": graft}, force=True)
    model.double()
    grafted = weights(model)
    with pytest.raises(EngramError, match="the model was moved, converted or loaded anew"):
        applied.revert()
    with pytest.raises(EngramError, match="the model was moved, converted or loaded anew"):
        switch.use("a")
    assert applied.applied and switch.active is None
    assert not changed(grafted, model)


def test_the_base_is_digested_once_for_all_grafts(monkeypatch):
    from engram_kernels.grafting import applied

    model = model_zoo.small_model()
    grafts = {str(i): some_graft(model, seed=i) for i in range(3)}
    seen = []
    digest = applied.tensor_checksum
    monkeypatch.setattr(applied, "tensor_checksum", lambda x: seen.append(1) or digest(x))
    GraftSwitch(model, grafts)
    assert len(seen) == len(graftable_parameters(model))


def test_an_exception_in_flight_is_kept():
    model = model_zoo.small_model()
    graft = some_graft(model)
    for context in (graft.apply(model), GraftSwitch(model, {"a": graft}, force=True)):
        with (
            pytest.warns(UserWarning, match="the graft stays in the model"),
            pytest.raises(KeyError, match="mine"),
        ):
            with context as entered:
                if isinstance(entered, GraftSwitch):
                    entered.use("a")
                name = next(iter(graft.indices))
                model.get_parameter(name).data.add_(1)
                raise KeyError("mine")


def test_later_changes_are_not_overwritten():
    model = model_zoo.small_model()
    one, two = some_graft(model, 1), some_graft(model, 2)
    two.indices = {name: at.clone() for name, at in one.indices.items()}
    two.values = {name: value + 1 for name, value in one.values.items()}
    before = weights(model)
    first = one.apply(model)
    second = two.apply(model, force=True)
    grafted = weights(model)
    with pytest.raises(EngramError, match="revert later grafts first"):
        first.revert()
    assert not changed(grafted, model)
    second.revert()
    first.revert()
    first.revert()
    assert not changed(before, model)


def test_another_base_is_refused_unless_forced():
    model = model_zoo.small_model()
    graft = some_graft(model)
    other = tuned(model)
    before = weights(other)
    with pytest.raises(EngramError, match="the weights that the graft was made for, got others"):
        graft.apply(other)
    assert not changed(before, other)
    with graft.apply(other, force=True):
        pass
    assert not changed(before, other)
    half = copy.deepcopy(model).bfloat16()
    with pytest.raises(EngramError, match="got others"):
        graft.apply(half)
    with graft.apply(half, force=True):
        name = next(iter(graft.indices))
        got = half.get_parameter(name).detach().reshape(-1)[graft.indices[name].long()]
        assert torch.equal(got, graft.values[name].bfloat16())
    with pytest.raises(EngramError, match="model: expected a tensor"):
        graft.apply(model_zoo.small_model("gpt2"), force=True)
    wide = model_zoo.small_model("qwen3")
    with pytest.raises(EngramError, match="model: expected shape"):
        graft.apply(wide, force=True)


def test_merge_and_unload():
    model = model_zoo.small_model()
    graft = some_graft(model)
    assert graft.merge_and_unload(model) is model
    with pytest.raises(EngramError):
        graft.apply(model)  # no longer the base


def test_switch_names():
    model = model_zoo.small_model()
    switch = GraftSwitch(model, {"a": some_graft(model)})
    before = weights(model)
    with pytest.raises(ValueError, match="name: expected one of a, or None, got 'c'"):
        switch.use("c")
    with switch:
        switch.use("a")
        switch.use("a")
    assert switch.active is None
    assert not changed(before, model)


def test_a_graft_is_applied_to_a_model_only(tmp_path):
    """A folder of weights has the graft's tensors too, but nothing of it would stay."""
    model = model_zoo.small_model()
    model.save_pretrained(tmp_path)
    graft = some_graft(model)
    for other in (tmp_path, str(tmp_path), dict(model.named_parameters()), None):
        for use in (graft.apply, graft.merge_and_unload, lambda x: GraftSwitch(x, {"a": graft})):
            with pytest.raises(TypeError, match=r"^model: expected a module, got "):
                use(other)


@pytest.mark.parametrize(
    ("grafts", "error", "message"),
    [
        ([], TypeError, "grafts: expected a mapping of names, got list"),
        ({}, ValueError, "grafts: expected at least one, got none"),
        ({"a": "folder"}, TypeError, "grafts: expected a Graft at 'a', got str"),
        ({None: None}, TypeError, "grafts: expected names that are texts, got None"),
    ],
    ids=str,
)
def test_a_switch_takes_named_grafts_only(grafts, error, message):
    model = model_zoo.small_model()
    before = weights(model)
    with pytest.raises(error, match=f"^{message}$"):
        GraftSwitch(model, grafts)
    assert not changed(before, model)


def test_a_forced_revert_leaves_the_grafts_values_for_the_next_time():
    model = model_zoo.small_model()
    graft, before = some_graft(model), weights(model)
    applied = graft.apply(model)
    grafted = weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    applied.revert(force=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    applied.write()
    assert applied.applied and not changed(grafted, model)
    applied.write()
    applied.revert()
    assert not changed(before, model)


def test_what_is_applied_is_shown_in_a_line():
    model = model_zoo.small_model()
    graft = some_graft(model)
    applied = graft.apply(model)
    assert repr(applied) == "AppliedGraft(50 weights of a LlamaForCausalLM, applied)"
    applied.revert()
    assert repr(applied) == "AppliedGraft(50 weights of a LlamaForCausalLM, reverted)"
    switch = GraftSwitch(model, {"a": graft, "b": graft})
    switch.use("b")
    assert repr(switch) == "GraftSwitch(a, b; active: b)"
