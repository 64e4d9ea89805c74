"""Hebb's and the delta rule's memories against a loop over the tokens in fp64."""

import sys
from types import ModuleType

import pytest
import torch
from accuracy import error

import engram_kernels as ek
from engram_kernels.backends.torch import chunks as torch_chunks
from engram_kernels.ops import linear_memory

RULES = {"hebbian": ek.hebbian_memory, "delta": ek.delta_memory}


def problem(length, keys, values, decays, batch=2, heads=3, dtype=torch.float32):
    q, k = torch.nn.functional.normalize(torch.randn(2, batch, length, heads, keys), dim=-1).to(dtype)
    v, beta = torch.randn(batch, length, heads, values).to(dtype), torch.rand(batch, length, heads)
    return q, k, v, beta, -0.3 * torch.rand(batch, length, heads) if decays else None


def loop(rule, q, k, v, beta, decay, memory=None):
    q, k, v, beta = (x.double() for x in (q, k, v, beta))
    if memory is None:
        memory = torch.zeros(q.shape[0], *q.shape[2:], v.shape[-1]).double()
    readouts = []
    for t in range(q.shape[1]):
        if decay is not None:
            memory = memory * decay[:, t].double().exp()[..., None, None]
        read = torch.einsum("bhk,bhkv->bhv", k[:, t], memory)
        target = v[:, t] - read if rule == "delta" else v[:, t]
        memory = memory + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * target)
        readouts.append(torch.einsum("bhk,bhkv->bhv", q[:, t], memory))
    return torch.stack(readouts, 1), memory


@pytest.mark.parametrize("decays", [False, True], ids=["no decay", "decay"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)], ids=str)
@pytest.mark.parametrize("size", [(1, 4, 4), (7, 3, 5), (64, 8, 8), (150, 16, 8)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_every_token_reads_after_its_write(device, rule, size, dtype, bound, decays):
    given = problem(*size, decays, dtype=dtype)
    truth, after = loop(rule, *given)
    got, memory = RULES[rule](*(x if x is None else x.to(device) for x in given))
    assert got.dtype == dtype and memory.dtype == torch.float32
    assert error(got, truth) < bound and error(memory, after) < 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_packed_sequences_with_states_are_those_sequences(device, rule):
    given = [x.to(device) for x in problem(160, 8, 6, True, batch=1)]
    ends, states = [0, 70, 70, 71, 160], torch.randn(4, 3, 8, 6).to(device)
    packed, after = RULES[rule](*given, states, torch.tensor(ends).to(device))
    for i in range(4):
        one = [x[:, ends[i] : ends[i + 1]] for x in given]
        alone, memory = RULES[rule](*one, states[i : i + 1])
        assert error(packed[:, ends[i] : ends[i + 1]], alone) < 1e-6
        assert error(after[i : i + 1], memory) < 1e-6


@pytest.mark.parametrize("chunk", [2, 64])
@pytest.mark.parametrize("decays", [False, True], ids=["no decay", "decay"])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_all_inputs(monkeypatch, rule, decays, chunk):
    monkeypatch.setattr(torch_chunks, "SIZE", chunk)
    q, k, v, beta, decay = problem(6, 3, 2, decays, batch=1, heads=2, dtype=torch.float64)
    leaves = [q, k, v, beta.double(), torch.randn(4, 2, 3, 2).double()]
    leaves += [decay.double()] if decays else []
    ends = torch.tensor([0, 3, 3, 4, 6])

    def function(q, k, v, beta, memory, decay=None):
        return RULES[rule](q, k, v, beta, decay, memory, ends)

    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("rule", RULES)
def test_compiles_whole_for_any_length(rule):
    def loss(*given):
        return RULES[rule](*given)[0].square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (5, 9, 70):
            given = [x.requires_grad_() for x in problem(length, 4, 3, True)]
            assert torch.equal(compiled(*given), loss(*given))


def test_one_pair_reads_alike_in_all_three():
    """After one write with β = 1 and |k| = 1 the three differ by the ridge alone."""
    k = torch.nn.functional.normalize(torch.randn(1, 1, 2, 5, dtype=torch.float64), dim=-1)
    v = torch.randn(1, 1, 2, 4, dtype=torch.float64)
    hebb, delta = ek.hebbian_memory(k, k, v)[0], ek.delta_memory(k, k, v)[0]
    ridge, _ = ek.ridge_memory(k, k, v, ridge=1e-9)
    assert error(hebb, v) < 1e-12 and error(delta, v) < 1e-12 and error(ridge, v) < 1e-8


def test_what_flash_linear_attention_is_asked(monkeypatch):
    """Its functions' own names and conventions, without a GPU: what it is given is computed by the loop."""
    given = problem(9, 4, 3, True)

    def served(rule, q, k, v, g, beta=None, scale=None, initial_state=None, output_final_state=False, **rest):
        assert scale == 1.0 and output_final_state and rest == {"cu_seqlens": None}
        beta = torch.ones_like(g) if beta is None else beta
        return loop(rule, q, k, v, beta, g, initial_state.double())

    for module, name, rule in (
        ("gated_delta_rule", "chunk_gated_delta_rule", "delta"),
        ("simple_gla", "chunk_simple_gla", "hebbian"),
    ):
        fake = ModuleType(module)
        setattr(fake, name, lambda *args, rule=rule, **options: served(rule, *args, **options))
        monkeypatch.setitem(sys.modules, f"fla.ops.{module}", fake)
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", ModuleType("fla.ops"))
    monkeypatch.setattr(linear_memory, "_fla_serves", lambda q, v: True)
    for rule, function in RULES.items():
        got, memory = function(*given)
        truth, after = loop(rule, *given)
        assert error(got, truth) < 1e-6 and error(memory, after) < 1e-6


def test_bad_input(device):
    given = [x.to(device) for x in problem(5, 4, 3, True)]
    for message, changed in {
        "k: expected shape": {"k": given[1][..., :2]},
        "beta: expected shape": {"beta": given[3][..., None]},
        "initial_state: expected shape": {"initial_state": torch.zeros(2, 3, 4, 4, device=device)},
        "q: expected a batch of 1": {"cu_seqlens": torch.tensor([0, 5], device=device)},
    }.items():
        for function in RULES.values():
            arguments = dict(zip(("q", "k", "v", "beta", "decay"), given, strict=True)) | changed
            with pytest.raises(ValueError, match=message):
                function(**arguments)
