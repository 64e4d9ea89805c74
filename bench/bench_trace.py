"""Causal tracing: many cells in a pass, against one cell at a time.

    python -m pytest bench/bench_trace.py --benchmark-only            SmolLM2, a known fact, three kinds
    python -m pytest bench/bench_trace.py --benchmark-only -k mlp     one of them

The baseline is upstream's algorithm: for each token and layer one pass of the whole model over all corrupted
copies, with hooks that corrupt and restore. Both are checked against it in fp64 on a few cells before they
are timed, interleaved in one run, caches cold. The floor counts the operations of the layers that must run,
for the tokens from the restored one on.
"""

from contextlib import ExitStack

import harness
import pytest
import torch

from engram_kernels.editing import load_model
from engram_kernels.hf.layers import decoder_layers
from engram_kernels.hf.projection import output_projection
from engram_kernels.hf.tokens import encode_row
from engram_kernels.tracing import KINDS, trace

PROMPT, SUBJECT = "{} is owned by", "Beats Music"
SAMPLES = 10
WINDOW = 10
SIGMA = 0.1
UPSTREAM = "one cell at a time"


@pytest.fixture(scope="module")
def loaded():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return *load_model("smollm2", device=device), device


class OneAtATime:
    """A cell is a pass of the whole model over all corrupted copies."""

    def __init__(self, model, tokenizer, kind, first, end):
        self.model, self.first, self.end = model, first, end
        self.ids = encode_row(tokenizer, SUBJECT, PROMPT).ids
        self.window = 1 if kind == "hidden" else WINDOW
        layers = decoder_layers(model)[1]
        self.modules = {
            "hidden": lambda: list(layers),
            "mlp": lambda: [output_projection(model, layer).module for layer in range(len(layers))],
            "attention": lambda: [layer.self_attn for layer in layers],
        }[kind]()
        weight = model.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(0)
        shape = (SAMPLES, end - first, weight.shape[1])
        self.noise = (3 * SIGMA * torch.randn(shape, generator=generator)).to(weight)

    def __call__(self, cells=None):
        count, depth = len(self.ids), len(self.modules)
        cells = cells or [(token, layer) for token in range(count) for layer in range(depth)]
        clean: dict = {}
        label = self._pass([(m, self._keep(clean, i)) for i, m in enumerate(self.modules)], 1)[0].argmax()
        embedding = self.model.get_input_embeddings()
        found = []
        for token, layer in cells:
            below = layer - self.window // 2
            window = range(max(0, below), min(depth, below + self.window))
            hooks = [(self.modules[i], self._restore(clean[i], token)) for i in window]
            chances = self._pass([(embedding, self._corrupt), *hooks], SAMPLES)
            found.append(chances[:, label].mean())
        return torch.stack(found).cpu()

    @torch.no_grad()
    def _pass(self, hooks, rows):
        ids = torch.tensor([self.ids], device=self.noise.device).expand(rows, -1)
        with ExitStack() as stack:
            for module, hook in hooks:
                stack.callback(module.register_forward_hook(hook).remove)
            return self.model(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)

    def _corrupt(self, _module, _inputs, output):
        output = output.clone()
        output[:, self.first : self.end] += self.noise
        return output

    def _keep(self, clean, layer):
        def hook(_module, _inputs, output):
            clean[layer] = (output[0] if isinstance(output, tuple) else output)[0]

        return hook

    def _restore(self, clean, token):
        def hook(_module, _inputs, output):
            states = output[0] if isinstance(output, tuple) else output
            states[:, token] = clean[token]
            return output

        return hook


def operations(model, kind, tokens, first) -> float:
    """Of the passes that a trace needs: two for each weight and token, in the layers above the start."""
    layers = decoder_layers(model)[1]
    weights = sum(parameter.numel() for parameter in layers[0].parameters())
    head = model.get_output_embeddings().weight.numel()
    total = 0
    for layer in range(len(layers)):
        start = layer + 1 if kind == "hidden" else max(0, layer - WINDOW // 2)
        for token in range(first, tokens):
            total += 2 * SAMPLES * ((len(layers) - start) * (tokens - token) * weights + head)
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_trace(benchmark, record, loaded, kind):
    """Every token and layer of one prompt."""
    model, tokenizer, device = loaded
    options = {"window": WINDOW, "samples": SAMPLES, "sigma": SIGMA}
    ours = trace(model, tokenizer, PROMPT, SUBJECT, kind, **options)
    (first, end), depth = ours.subject, ours.effects.shape[1]
    baseline = OneAtATime(model, tokenizer, kind, first, end)
    cells = [(token, layer) for token in (first, len(ours.tokens) - 1) for layer in (0, depth // 2)]
    exact = OneAtATime(model, tokenizer, kind, first, end)
    model.double()
    try:
        exact.noise = exact.noise.double()
        truth = exact(cells)
    finally:
        model.float()
    rows, columns = zip(*cells, strict=True)
    errors = {
        "engram": harness.relative(ours.effects[list(rows), list(columns)], truth),
        UPSTREAM: harness.relative(baseline(cells), truth),
    }
    harness.check(errors, slack=1e-4)
    calls = {
        "engram": lambda: trace(model, tokenizer, PROMPT, SUBJECT, kind, **options),
        UPSTREAM: baseline,
    }
    outcomes = harness.interleave(calls, device, rounds=1, once=tuple(calls))
    for name, error in errors.items():
        outcomes[name].error = error
    traffic = sum(parameter.nbytes for parameter in model.parameters())
    work = {torch.float32: operations(model, kind, len(ours.tokens), first)}
    case = f"trace {kind} {device} {len(ours.tokens)} tokens × {depth} layers × {SAMPLES} copies"
    record(case, "engram", outcomes, traffic, harness.floor(device, traffic, work))
    benchmark.pedantic(calls["engram"], rounds=1)
