"""The layers: what a token sees, states that go on, packed sequences, routes, gradients of every weight."""

from itertools import pairwise

import pytest
import torch
from accuracy import error

from engram_kernels.layers import MixtureOfMemories, RidgeMemory

RULES = ("ridge", "delta", "hebbian")
OPTIONS = {
    "plain": {"use_decay": False, "use_short_conv": False},
    "gated": {"use_output_gate": True},
    "ridge decays": {"ridge_decays": True},
}


def layer(rule, **options):
    return RidgeMemory(12, num_heads=2, head_dim=5, rule=rule, **options).double()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rule", RULES)
def test_token_by_token_is_all_at_once(rule, options):
    module, x = layer(rule, **OPTIONS[options]), torch.randn(2, 9, 12).double()
    whole, after = module(x)
    parts, state = [], None
    for start, end in ((0, 4), (4, 5), (5, 6), (6, 9)):
        out, state = module(x[:, start:end], state)
        parts.append(out)
    assert error(torch.cat(parts, 1), whole) < 1e-10
    memory, expected = (s.memory if torch.is_tensor(s.memory) else s.memory.cross for s in (state, after))
    assert error(memory, expected) < 1e-10


@pytest.mark.parametrize("rule", RULES)
def test_no_token_sees_a_later_one(rule):
    module, x = layer(rule), torch.randn(1, 9, 12).double()
    changed = x.clone()
    changed[:, 6:] = torch.randn(1, 3, 12)
    before, after = module(x)[0], module(changed)[0]
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.allclose(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("rule", RULES)
def test_packed_sequences_are_those_sequences(rule):
    module, x, ends = layer(rule), torch.randn(1, 9, 12).double(), [0, 4, 5, 9]
    packed, _ = module(x, cu_seqlens=torch.tensor(ends))
    for start, end in pairwise(ends):
        assert error(packed[:, start:end], module(x[:, start:end])[0]) < 1e-10
    with pytest.raises(ValueError, match="state: expected None where sequences are packed"):
        module(x, module(x)[1], torch.tensor(ends))


@pytest.mark.parametrize("make", [layer, lambda rule: mixture(rule).double()], ids=["one", "mixture"])
@pytest.mark.parametrize("rule", RULES)
def test_every_weight_has_a_gradient(rule, make):
    module = make(rule)
    module(torch.randn(2, 9, 12).double())[0].square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in module.parameters())


def test_the_ridge_begins_where_it_is_told_and_keeps_its_floor():
    module = layer("ridge", ridge=0.3, ridge_floor=0.1)
    assert error(module.ridge(), torch.full((2, 5), 0.3)) < 1e-6
    with torch.no_grad():
        module.ridge_logits.fill_(-100)
    assert error(module.ridge(), torch.full((2, 5), 0.1, dtype=torch.float64)) < 1e-12
    assert "rule='ridge', heads=2, head_dim=5" in repr(module)


def test_bf16_layers_answer_in_bf16():
    module = RidgeMemory(12, num_heads=2, head_dim=5, use_output_gate=True).bfloat16()
    assert module(torch.randn(2, 9, 12).bfloat16())[0].dtype == torch.bfloat16


def mixture(rule, **options):
    return MixtureOfMemories(12, num_memories=3, top_k=2, num_heads=2, head_dim=5, rule=rule, **options)


def dense_mixture(module, x):
    """Every memory on the subsequence of its tokens, by itself."""
    memories, weights = module.route(x)
    out = torch.zeros(*x.shape[:2], 2, 5, dtype=x.dtype)
    for b in range(len(x)):
        for m, projection in enumerate(module.kv_projs):
            token, place = (memories[b] == m).nonzero(as_tuple=True)
            rows = x[b : b + 1, token]
            k, v = (part.unflatten(-1, (2, -1)) for part in projection(rows).chunk(2, -1))
            q = module.q_proj(rows).unflatten(-1, (2, -1))
            read, _ = module.read(q, k, v, *module.gates(rows), None, None)
            out[b, token] += module.o_norm(read[0]) * weights[b, token, place][:, None, None]
    return module.o_proj(out.flatten(-2))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_a_mixture_is_each_memory_on_its_own_tokens(rule, shared):
    module, x = mixture(rule, shared=shared).double(), torch.randn(2, 20, 12).double()
    assert error(module(x)[0], dense_mixture(module, x)) < 1e-6  # the router's weights are fp32


@pytest.mark.parametrize("rule", RULES)
def test_a_mixture_goes_on(rule):
    module, x = mixture(rule).double(), torch.randn(2, 20, 12).double()
    whole, _ = module(x)
    first, state = module(x[:, :13])
    second, _ = module(x[:, 13:], state)
    assert error(torch.cat([first, second], 1), whole) < 1e-10


def test_bad_input():
    for message, make in {
        "rule: expected one of ridge, delta, hebbian": lambda: layer("other"),
        "ridge: expected a finite number above 0.1": lambda: layer("ridge", ridge=0.1, ridge_floor=0.1),
        "top_k: expected at most num_memories, 3": lambda: MixtureOfMemories(12, 3, 4),
        r"x: expected shape \[B, T, D\]": lambda: layer("ridge")(torch.randn(9, 12).double()),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_padding_of_zeros_is_read_in_half_precision(rule, dtype):
    layer = RidgeMemory(8, num_heads=2, head_dim=4, rule=rule).to(dtype)
    x = torch.randn(1, 7, 8).to(dtype)
    x[:, :3] = 0
    out, _ = layer(x)
    assert out.isfinite().all() and not out[:, :3].any()
