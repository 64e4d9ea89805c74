"""One routed expert opened: it computes what it did, its keys and answers are those of its own product."""

import pytest

pytest.importorskip("transformers")

import copy
from functools import partial

import model_zoo
import torch
from editing_helpers import changed, small_editor, weights
from torch.overrides import TorchFunctionMode

from engram_kernels.editing import Edit, EditResult, open_expert, routed_expert
from engram_kernels.editing.search.values import ValueOptions
from engram_kernels.errors import EngramError
from engram_kernels.hf.projection import output_projection

EDIT = Edit("The Eiffel Tower", "{}", "Rome")
IDS = torch.tensor([[5, 17, 200, 31, 8, 90, 41, 3]])
FAMILIES = ["mixtral", "qwen3_moe", "qwen2_moe"]


class Product(TorchFunctionMode):
    """The oracle: see and change the product with one slice of the experts' tensor, where it is computed."""

    def __init__(self, weight, change=0.0):
        super().__init__()
        self.pointer, self.shape, self.change, self.keys = weight.data_ptr(), weight.shape, change, []

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        output = function(*arguments, **(keywords or {}))
        weight = arguments[1] if function is torch.nn.functional.linear else None
        if weight is not None and weight.data_ptr() == self.pointer and weight.shape == self.shape:
            self.keys.append(arguments[0])
            return output + self.change
        return output


@pytest.fixture
def make(cache, one_thread):
    value = ValueOptions(steps=15, weight_decay=0.0, kl_weight=0.0, clamp=20.0)
    return partial(small_editor, cache_dir=cache, contexts=((4, 2),), value=value)


def model_of(family, implementation="eager"):
    model = model_zoo.small_model(family)
    model.set_experts_implementation(implementation)
    return model


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_answers_are_those_of_the_product(family):
    model = model_of(family)
    experts = model.model.layers[1].mlp.experts
    change = torch.randn(32)
    for expert in range(experts.down_proj.shape[0]):
        with Product(experts.down_proj[expert]) as seen:
            plain = logits(model)
        with Product(experts.down_proj[expert], change):
            moved = logits(model)
        with open_expert(model, 1, expert) as opened:
            assert output_projection(model, 1).module is opened
            keys = []
            hook = opened.register_forward_hook(
                lambda _module, inputs, _output, to=keys: to.append(inputs[0])
            )
            assert torch.equal(logits(model), plain)
            hook.remove()
            hook = opened.register_forward_hook(lambda _module, _inputs, output: output + change)
            torch.testing.assert_close(logits(model), moved, rtol=1e-4, atol=1e-5)
        routed = keys[0][keys[0].any(-1)]
        expected = torch.cat(seen.keys) if seen.keys else keys[0][:0]
        assert len(routed) == len(expected)
        # Its tokens come to an expert in another order: those that prefer it first.
        ordered = (rows[rows[:, 0].argsort()] for rows in (routed, expected))
        torch.testing.assert_close(*ordered, rtol=1e-4, atol=1e-6)
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_edit_of_an_expert(make, family, implementation, tmp_path):
    model = model_of(family, implementation)
    editor, plain, before = make(model=model), logits(model), weights(model)
    expert = routed_expert(model, editor.tokenizer, EDIT, 1)
    name = "model.layers.1.mlp.experts.down_proj"
    with open_expert(model, 1, expert):
        result = editor.edit(EDIT, layers=1)
    assert result.modules == [f"{name}.{expert}"]
    assert result.records[0].probability_after > 2 * result.records[0].probability_before
    assert changed(before, model) == [name]
    others = [number for number in range(len(before[name])) if number != expert]
    assert torch.equal(model.get_parameter(name)[others], before[name][others])
    edited = logits(model)
    result.save_pretrained(tmp_path / "edit")
    result.revert()
    assert not changed(before, model) and torch.equal(logits(model), plain)
    loaded = EditResult.from_pretrained(tmp_path / "edit")
    with pytest.raises(EngramError, match=r"routed experts alone: open one|expected a matrix"):
        loaded.apply(model)
    with open_expert(model, 1, expert):
        loaded.apply(model)
    assert torch.equal(logits(model), edited)


def test_peft_serves_two_experts_of_one_layer_beside_a_shared_one(make, tmp_path):
    """Their adapters are one, of the larger rank, in which the other experts' parts are 0."""
    peft = pytest.importorskip("peft")
    model = model_of("qwen2_moe")
    base, editor, results = copy.deepcopy(model), make(model=model), []
    facts = [Edit(f"Tower {letter}", "{}", "Japan") for letter in "ABCDEFGHIJ"]
    groups = {}
    for fact in facts:
        groups.setdefault(routed_expert(model, editor.tokenizer, fact, 1), []).append(fact)
    first, second, *_ = sorted(groups.items(), key=lambda group: -len(group[1]))
    for (expert, edits), count in ((first, 2), (second, 1)):
        with open_expert(model, 1, expert):
            results.append(editor.edit(edits[:count], layers=1, method="emmet"))
    results.append(editor.edit(EDIT, layers=1))
    both, edited = EditResult.merge(results), logits(model)
    both.save_pretrained(tmp_path / "both")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "both")
    torch.testing.assert_close(logits(adapted), edited, rtol=1e-4, atol=1e-4)
    loaded = EditResult.from_pretrained(tmp_path / "both")
    assert loaded.modules == both.modules and len(set(loaded.modules)) == 3
    for module in both.modules:
        for mine, theirs in zip(loaded.factors(module), both.factors(module), strict=True):
            assert torch.equal(mine, theirs)


def test_a_fact_that_the_open_expert_does_not_get(make):
    model = model_of("qwen3_moe")
    editor, before = make(model=model), weights(model)
    preferred = routed_expert(model, editor.tokenizer, EDIT, 1)
    refused = 0
    for expert in range(4):
        with open_expert(model, 1, expert):
            try:
                editor.edit(EDIT, layers=1).revert()
            except EngramError as error:
                assert str(error).endswith(
                    "got nan: the projection answers 0, as an expert that does not get it"
                )
                assert expert != preferred
                refused += 1
        assert not changed(before, model)
    # Each token is sent to two of the four.
    assert refused == 2


def test_router_prefers_the_expert_of_the_largest_weight():
    model, tokenizer = model_of("qwen3_moe"), model_zoo.byte_level_tokenizer()
    edit = Edit("Colosseum", "the {} is located in the city of", "Paris")
    ids = tokenizer("the Colosseum", return_tensors="pt")["input_ids"]
    states = []
    hook = model.model.layers[2].mlp.register_forward_pre_hook(
        lambda _module, inputs: states.append(inputs[0])
    )
    with torch.no_grad():
        model(ids)
    hook.remove()
    expected = (states[0][0, -1] @ model.model.layers[2].mlp.gate.weight.T).argmax().item()
    assert routed_expert(model, tokenizer, edit, 2) == expected


def test_contexts_that_are_sent_elsewhere_have_no_part_in_the_key(make):
    """Two of four experts get a token: some of the subject's contexts miss the expert of the bare prompt."""
    model = model_of("qwen3_moe")
    editor = make(model=model, contexts=((4, 6), (6, 6)))
    expert = routed_expert(model, editor.tokenizer, EDIT, 1)
    texts = ["", *(f"{prefix}. " for prefix in editor.prefixes())]
    shares = [0.5] + [0.5 / (len(texts) - 1)] * (len(texts) - 1)
    with open_expert(model, 1, expert) as opened:
        keys = []
        hook = opened.register_forward_hook(lambda _module, inputs, _output: keys.append(inputs[0][-1]))
        with torch.no_grad():
            for text in texts:
                model(editor.tokenizer(text + EDIT.subject, return_tensors="pt")["input_ids"])
        hook.remove()
        (write,) = editor.edit(EDIT, layers=1, method="rome").writes
    there = [(share, key) for share, key in zip(shares, keys, strict=True) if key.any()]
    assert 1 < len(there) < len(texts)
    mean = sum(share * key for share, key in there) / sum(share for share, _ in there)
    torch.testing.assert_close(write.keys[0], mean, rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_the_expert_that_is_open(make):
    model = model_of("mixtral")
    editor, inverses = make(model=model), []
    for expert in (0, 1, 0):
        with open_expert(model, 1, expert):
            inverses.append(editor.covariance(1).inverse())
    assert torch.equal(inverses[0], inverses[2])
    assert not torch.allclose(inverses[0], inverses[1], rtol=0.1)


def test_bad_input():
    model = model_of("mixtral")
    before = list(model.model.layers[1].mlp.experts.__dict__)
    for layer, expert, error, words in (
        (4, 0, ValueError, "layer: expected from 0 to 3"),
        ("1", 0, TypeError, "layer: expected an integer, got str"),
        (1, 2, ValueError, "expert: expected from 0 to 1 in layer 1, got 2"),
        (1, True, TypeError, "expert: expected an integer, got bool"),
    ):
        with pytest.raises(error, match=f"^{words}"), open_expert(model, layer, expert):
            pass
    with (
        open_expert(model, 1, 0),
        pytest.raises(EngramError, match=r"^layer: expected one with no expert open, got 1"),
        open_expert(model, 1, 1),
    ):
        pass
    assert list(model.model.layers[1].mlp.experts.__dict__) == before
    with (
        pytest.raises(EngramError, match=r"^layer: expected one whose routed experts are one tensor, got 1"),
        open_expert(model_zoo.small_model(), 1, 0),
    ):
        pass
    model.model.layers[1].mlp.experts._apply_gate = lambda states: states.chunk(2, -1)[0]
    with (
        pytest.raises(EngramError, match=r"^layer: expected gated linear maps as experts, got others in 1"),
        open_expert(model, 1, 0),
    ):
        pass


def test_a_copy_of_a_model_with_an_open_expert_asks_its_own():
    ids = torch.tensor([[5, 17, 200, 31]])
    model = model_zoo.small_model("mixtral")
    with open_expert(model, 1, 0), torch.no_grad():
        other = copy.deepcopy(model)
        answers = other(ids).logits
        model.model.layers[1].mlp.experts.down_proj.mul_(3)
        assert torch.equal(other(ids).logits, answers)
        other.model.layers[1].mlp.experts.down_proj.mul_(3)
        assert torch.equal(other(ids).logits, model(ids).logits)
        assert not torch.equal(other(ids).logits, answers)
