"""What grafts have in common, and several in one."""

from contextlib import nullcontext

import model_zoo
import pytest
import torch
from defaults import DEFAULTS
from grafting_helpers import some_graft, tuned

import engram_kernels as ek
from engram_kernels import EngramError
from engram_kernels.grafting import Graft, graftable_parameters


def plain(indices, values, size=10, checksum="x"):
    at = {"layers.0.w": torch.tensor(indices, dtype=torch.int32)}
    return Graft(at, {"layers.0.w": torch.tensor(values)}, {"layers.0.w": (size,)}, {"layers.0.w": checksum})


def test_merge_and_overlap():
    one, two, three = plain([1, 4], [1.0, 2.0]), plain([4, 7], [5.0, 6.0]), plain([0, 4], [9.0, 8.0])
    average = Graft.merge([one, two, three])
    assert average.indices["layers.0.w"].tolist() == [0, 1, 4, 7]
    assert average.values["layers.0.w"].tolist() == [9.0, 1.0, 5.0, 6.0]
    assert average.indices["layers.0.w"].dtype == torch.int32
    first = Graft.merge([one, two, three], method="first")
    assert first.values["layers.0.w"].tolist() == [9.0, 1.0, 2.0, 6.0]
    assert one.overlap(two) == (1, 2, 2, 1 / 3)
    assert one.overlap(one).jaccard == 1
    for default in DEFAULTS.values():
        with default():
            again = Graft.merge([one, two, three])
        assert torch.equal(again.values["layers.0.w"], average.values["layers.0.w"])
    with pytest.raises(EngramError, match="grafts of one base"):
        Graft.merge([one, plain([2], [1.0], checksum="y")])
    with pytest.raises(
        ValueError, match=r"method: expected one of average, first, task_arithmetic, .*, got 'last'"
    ):
        Graft.merge([one], method="last")
    with pytest.raises(ValueError, match="grafts: expected at least one"):
        Graft.merge([])


def test_density():
    model = model_zoo.small_model()
    graft = some_graft(model, count=77)
    rows = graft.density()
    assert sum(row.entries for row in rows) == 77
    assert sum(row.size for row in rows) == sum(p.numel() for p in graftable_parameters(model).values())
    assert {row.layer for row in rows} == {0, 1, 2, 3}
    assert {row.module for row in rows if row.layer == 1} >= {
        "mlp.down_proj.weight",
        "self_attn.q_proj.weight",
    }


@pytest.mark.parametrize(
    ("grafts", "message"),
    [
        (["x"], "grafts: expected grafts, got str"),
        ("x", "grafts: expected grafts, got str"),
        ([plain([1], [1.0]), None], "grafts: expected grafts, got NoneType"),
        (3, "grafts: expected a list of grafts, got int"),
    ],
    ids=str,
)
def test_only_grafts_are_merged(grafts, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        Graft.merge(grafts)


def test_a_graft_overlaps_with_a_graft_only():
    with pytest.raises(TypeError, match=r"^other: expected a Graft, got dict$"):
        plain([1], [1.0]).overlap({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"indices": {"w": torch.tensor([4, 1])}},
            "indices: expected ascending positions from 0 to 9 in 'w'",
        ),
        (
            {"indices": {"w": torch.tensor([1, 1])}},
            "indices: expected ascending positions from 0 to 9 in 'w'",
        ),
        (
            {"indices": {"w": torch.tensor([1, 10])}},
            "indices: expected ascending positions from 0 to 9 in 'w'",
        ),
        (
            {"indices": {"w": torch.tensor([-1, 1])}},
            "indices: expected ascending positions from 0 to 9 in 'w'",
        ),
        (
            {"indices": {"w": torch.ones(2)}},
            r"indices: expected integers \[n\] in 'w', got torch.float32 \[2\]",
        ),
        ({"values": {"w": torch.ones(3)}}, r"values: expected shape \[2\] in 'w', got \[3\]"),
        ({"values": {}}, r"values: expected shape \[2\] in 'w', got none"),
        ({"shapes": {}}, "indices: expected names that have a shape, got 'w'"),
    ],
    ids=str,
)
def test_positions_and_values_that_do_not_fit_are_refused(change, message):
    fits = {"indices": {"w": torch.tensor([1, 4])}, "values": {"w": torch.ones(2)}, "shapes": {"w": (2, 5)}}
    assert Graft(**fits, checksums={}).size == 2
    with pytest.raises(ValueError, match=f"^{message}"):
        Graft(**{**fits, **change}, checksums={})


@pytest.mark.parametrize("default", [None, *DEFAULTS])
def test_a_grafts_masks_make_it_again(default):
    model = model_zoo.small_model()
    graft = some_graft(model, count=333)
    pre = {name: weight.detach() for name, weight in graftable_parameters(model).items()}
    ft = {name: tuned(model).get_parameter(name).detach() for name in pre}
    with DEFAULTS[default]() if default else nullcontext():
        masks = graft.masks()
    assert masks.keys() == graft.shapes.keys()
    again = Graft.from_masks(pre, ft, masks)
    assert again.indices.keys() == graft.indices.keys() and again.checksums == graft.checksums
    for name, at in graft.indices.items():
        assert torch.equal(again.indices[name], at) and torch.equal(again.values[name], graft.values[name])
    with graft.apply(model):
        grafted = {name: model.get_parameter(name).detach().clone() for name in masks}
    for name, mask in masks.items():
        assert torch.equal(ek.graft_blend_packed(pre[name], ft[name], mask), grafted[name])


def test_a_graft_is_shown_in_a_few_lines():
    graft = plain(list(range(9000)), [0.5] * 9000, size=9_000_000)
    graft.base_model, graft.recipe = "smollm2", {"name": "rounds"}
    assert repr(graft) == (
        "Graft(9,000 of 9,000,000 weights (0.1 %) in 1 of 1 parameters,\n"
        "      base 'smollm2', recipe 'rounds')"
    )
    assert "None" in repr(plain([], []))


def test_a_difference_of_state_dicts_has_tied_weights_once():
    base = model_zoo.small_model("gpt2")
    other = tuned(base)
    graft = Graft.from_difference(base.state_dict(), other.state_dict())
    assert set(graft.indices) == set(dict(base.named_parameters())) < set(base.state_dict())
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    with graft.apply(base):
        assert all(
            torch.equal(weight, other.state_dict()[name]) for name, weight in base.state_dict().items()
        )
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())
    untied = other.state_dict() | {"lm_head.weight": other.lm_head.weight + 1}
    with pytest.raises(
        EngramError, match=r"^ft: expected one tensor as 'transformer\.wte\.weight' and as 'lm_head\.weight'"
    ):
        Graft.from_difference(base.state_dict(), untied)


def test_a_difference_of_state_dicts_may_lie_in_a_buffer():
    """Such as the bias by which a router chooses experts."""
    base = model_zoo.small_model()
    base.model.layers[1].register_buffer("router_bias", torch.zeros(4))
    other = tuned(base)
    other.model.layers[1].router_bias += 1
    graft = Graft.from_difference(base.state_dict(), other.state_dict())
    with graft.apply(base):
        assert base.model.layers[1].router_bias.tolist() == [1, 1, 1, 1]
    assert base.model.layers[1].router_bias.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.ones(3)}, r"ft: expected \[2\] of torch\.float32 in 'w', got \[3\] of torch\.float32$"),
        ({"w": torch.ones(2).bfloat16()}, r"ft: expected .* in 'w', got \[2\] of torch\.bfloat16$"),
        (
            {"seen": torch.tensor(4)},
            r"ft: expected in 'seen', which holds torch\.int64, what pre has, got others$",
        ),
    ],
)
def test_a_difference_names_the_tensor_that_does_not_fit(change, message):
    """Such as the embeddings of a model that was given more tokens."""
    pre = {"w": torch.zeros(2), "seen": torch.tensor(3)}
    ft = {"w": torch.ones(2), "seen": torch.tensor(3)}
    assert set(Graft.from_difference(pre, ft).shapes) == {"w"}
    with pytest.raises(EngramError, match=f"^{message}"):
        Graft.from_difference(pre, ft | change)
