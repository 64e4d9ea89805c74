"""What a user's program looks like to a type checker; `make lint` checks it strictly, and nobody runs it."""

from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import engram_kernels as ek


def operators(weight: Tensor, keys: Tensor, values: Tensor, covariance: ek.Covariance) -> None:
    left, right = ek.low_rank_factors(weight, keys, values, covariance)
    assert_type(left, Tensor)
    assert_type(ek.apply_low_rank_(weight, left, right), Tensor)
    assert_type(ek.graft_blend(weight, weight, weight), Tensor)
    assert_type(ek.top_k_mask([weight], 10), list[Tensor])
    assert_type(ek.pseudo_inverse(weight), Tensor)
    assert_type(ek.backends(), dict[str, str | None])
    with ek.use_backend("torch"):
        pass
    operator = ek.Preconditioner.from_covariance(covariance, ridge=20.0).preserve(keys)
    assert_type(operator.apply(keys), Tensor)
    assert_type(operator.factors(weight, keys, values=values), tuple[Tensor, Tensor])


def facts(folder: Path) -> None:
    model, tokenizer = ek.editing.load_model("smollm2", dtype=torch.bfloat16)
    editor = ek.editing.Editor(model, tokenizer)
    fact = ek.editing.Edit("The Eiffel Tower", "{} is located in the city of", "Rome")
    result = editor.edit(fact)
    assert_type(result, ek.editing.EditResult)
    result.revert()
    result.save_pretrained(folder)
    both = ek.editing.EditResult.merge([result, ek.editing.EditResult.from_pretrained(folder)])
    with both.apply(model):
        pass
    assert_type(editor.trace("{} is in", "The Louvre"), ek.tracing.Trace)


def skills(base: nn.Module, tuned: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    graft = ek.grafting.localize(base, tuned, batches, sparsity=1e-4)
    assert_type(graft, ek.grafting.Graft)
    with graft.apply(base) as applied:
        assert_type(applied, ek.grafting.AppliedGraft)
    assert_type(ek.grafting.Graft.merge([graft, graft]), ek.grafting.Graft)


def memories(latents: Tensor, folder: Path) -> None:
    memory = ek.memory.EpisodicMemory(slots=16, latent=384)
    memory.write(latents)
    assert_type(memory.read(latents), Tensor)
    memory.save_pretrained(folder)
    assert_type(ek.memory.EpisodicMemory.from_pretrained(folder), ek.memory.EpisodicMemory)


def sequences(tokens: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    readouts, state = ek.ridge_memory(q, k, v, ridge=1e-3)
    assert_type(readouts, Tensor)
    assert_type(ek.ridge_forget(state, k, v), ek.RidgeState)
    assert_type(ek.delta_memory(q, k, v), tuple[Tensor, Tensor])
    layer = ek.layers.RidgeMemory(hidden_size=64, num_heads=2, head_dim=16)
    assert_type(layer.ridge(), Tensor)
    ek.layers.MixtureOfMemories(hidden_size=64, num_memories=4, top_k=2)(tokens)


def libraries() -> None:
    with ek.integrations.accelerate("easyeditor") as report:
        print(report)
