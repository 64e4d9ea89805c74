"""The peak memory of `localize`, part by part.

    python bench/graft_memory.py                     SmolLM2 in fp32, the fine-tuned model in memory
    python bench/graft_memory.py --mapped            the fine-tuned model in a file

The fine-tuned model is the base, a little larger: what it knows makes no difference to memory. On CUDA the
figures are the allocator's, on the CPU the process's resident memory (Linux).
"""

import copy
import tempfile
from typing import Annotated

import harness
import torch
import typer

from engram_kernels.editing import load_model
from engram_kernels.grafting import graftable_parameters, localize


def free(parameter: torch.nn.Parameter) -> None:
    parameter.grad = None


def main(
    model: Annotated[str, typer.Option(help="A Hugging Face name, a folder, or smollm2.")] = "smollm2",
    mapped: Annotated[bool, typer.Option(help="Give the fine-tuned model as a file.")] = False,
    batch: Annotated[int, typer.Option(help="Rows a batch.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens a row.")] = 64,
    steps: Annotated[int, typer.Option(help="Gradient steps, at least 5.")] = 5,
) -> None:
    """Measure a few steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, _ = load_model(model, dtype=torch.float32, device=device)
    names = list(graftable_parameters(base))
    graftable = sum(base.get_parameter(name).nbytes for name in names)
    ids = torch.randint(base.config.vocab_size, (batch, length), device=device)
    data = [{"input_ids": ids, "labels": ids}]

    with tempfile.TemporaryDirectory() as folder:
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            for name in names:
                tuned.get_parameter(name).mul_(1.01)
        if mapped:
            tuned.save_pretrained(folder)
            tuned = folder
        # A training pass whose gradients are freed as they come: the activations, and what PyTorch keeps.
        hooks = []
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name in names)
            if name in names:
                hooks.append(parameter.register_post_accumulate_grad_hook(free))
        base(**data[0]).loss.backward()
        activations = harness.peak_bytes(lambda: base(**data[0]).loss.backward(), device)
        for hook in hooks:
            hook.remove()

        start = harness.memory_before(device)
        localize(base, tuned, data, steps=steps)
        extra = harness.memory_peak(device) - start
    say = lambda what, size: print(f"{what:45s} {size / 2**20:8.0f} MB")  # noqa: E731
    say("graftable weights", graftable)
    say("before localize: pre" + ("" if mapped else " and ft"), start)
    say("θ", graftable)
    say("S, fp32", graftable)
    say("activations of one batch", activations)
    say("ft, mapped: pages in use, at most", graftable if mapped else 0)
    say("sum: what localize may add", 2 * graftable + activations + (graftable if mapped else 0))
    say("measured: what localize adds at its peak", extra)


if __name__ == "__main__":
    typer.run(main)
