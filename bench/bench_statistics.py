"""The second moments of five layers of SmolLM2-135M: one pass over the text for all of them.

    python -m pytest bench/bench_statistics.py --benchmark-only

Baseline, interleaved in the same run, caches cold: upstream's algorithm, a pass over the same text for each
layer that stops at that layer. Both are checked against the model in fp64 before they are timed. The floor is
the products with the weights below the deepest layer's output projection, attention's own left out, and those
of the moments. Traffic counts the weights and the moments once.
"""

import copy

import pytest
import torch
from harness import check, floor, interleave, relative

from engram_kernels.editing import load_model
from engram_kernels.editing.statistics import statistics
from engram_kernels.errors import EngramError
from engram_kernels.hf.projection import output_projection

LAYERS = (4, 5, 6, 7, 8)
BASELINE = "one pass a layer"


@pytest.fixture(scope="module")
def model():
    try:
        return load_model("smollm2")[0]
    except EngramError as error:
        pytest.skip(str(error))


def joint(model, ids):
    return statistics.second_moments(model, [output_projection(model, layer) for layer in LAYERS], ids)


def one_by_one(model, ids):
    found = {}
    for layer in LAYERS:
        found |= statistics.second_moments(model, [output_projection(model, layer)], ids)
    return found


@torch.no_grad()
def moments_in_fp64(model, ids):
    """The whole model in fp64, chunk by chunk, its keys kept and multiplied at the end."""
    wide = copy.deepcopy(model).double()
    keys = {layer: [] for layer in LAYERS}
    for layer in LAYERS:
        module = wide.get_submodule(output_projection(model, layer).name)
        module.register_forward_pre_hook(
            lambda _module, inputs, layer=layer: keys[layer].append(inputs[0][0])
        )
    for chunk in ids.split(statistics.CHUNK):
        wide(input_ids=chunk[None].to(wide.device), use_cache=False)
    return {layer: torch.cat(found).T @ torch.cat(found) for layer, found in keys.items()}


@pytest.mark.parametrize("count", [512, 8192])
def test_statistics(benchmark, record, device, model, count):
    """Σ kᵀk of layers 4 to 8."""
    model = model.to(device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (count,), generator=generator)
    variants = {"engram": joint, BASELINE: one_by_one}

    truth = moments_in_fp64(model, ids)
    errors = {}
    for name, variant in variants.items():
        found = variant(model, ids)
        errors[name] = max(relative(found[layer], truth[layer]) for layer in LAYERS)
    check(errors, slack=1e-4)

    calls = {name: (lambda variant=variant: variant(model, ids)) for name, variant in variants.items()}
    outcomes = interleave(calls, device, rounds=3)
    for name, error in errors.items():
        outcomes[name].error = error
    below = model.model.layers[: LAYERS[-1] + 1]
    weights = sum(weight.numel() for weight in below.parameters()) - below[-1].mlp.down_proj.weight.numel()
    entries = sum(moment.numel() for moment in truth.values())
    work = {torch.float32: 2 * weights * count, torch.float64: 2 * entries * count}
    traffic = 4 * weights + 8 * entries
    case = f"statistics {device} float32 layers 4 to 8, {count} tokens"
    record(case, "engram", outcomes, traffic, floor(device, traffic, work))
    benchmark.pedantic(calls["engram"], rounds=1)
