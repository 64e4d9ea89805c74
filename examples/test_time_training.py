"""Test-time training in place: a model's own `down_proj` as a memory of the text that it is reading.

    python examples/test_time_training.py --text article.txt --chunks 6

The text is read in chunks, each without the tokens of those before it: what a chunk tells the next ones goes
through one matrix, the projection out of the MLP of one layer. After a chunk is scored, its keys K (what goes
into the projection) and the errors E = −η ∂loss/∂(what comes out) are written: `ΔW = Eᵀ(λI + KKᵀ)⁻¹K` by the
editor's operator, beside the plain sum `ΔW = EᵀK`. Every chunk is scored before it is written, and the
matrix is put back at the end. Feng et al. 2026 (arXiv 2604.06169) write the same matrix, with values from a
trained projection.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import engram_kernels as ek
from engram_kernels.editing import load_model
from engram_kernels.editing.statistics.corpus import read_texts, wikipedia_file
from engram_kernels.hf.projection import output_projection

RULES = ("none", "sum", "ridge")


def write(weight: Tensor, keys: Tensor, errors: Tensor, rule: str, ridge: float) -> None:
    """Add a chunk's errors [T, out] for its keys [T, in] to a weight [out, in]."""
    if rule == "sum":
        ek.apply_low_rank_(weight, errors.T.contiguous(), keys)
        return
    values = keys @ weight.T + errors
    identity = torch.eye(keys.shape[1], dtype=torch.float64, device=keys.device)
    # λ in units of the keys' mean square length, so that it means the same for every layer.
    scale = float(keys.square().sum(1).mean())
    left, right = ek.low_rank_factors(weight, keys, values, ridge=ridge * scale, inverse_covariance=identity)
    ek.apply_low_rank_(weight, left, right)


def losses(
    model: nn.Module, tokens: Tensor, layer: int, rule: str, step: float, ridge: float, chunk: int
) -> list[float]:
    """The mean loss of every chunk, scored before it is written; the weight is as before at the end."""
    projection = output_projection(model, layer)
    weight, kept = projection.matrix, {}
    before = weight.clone()

    def keep(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        kept["keys"], kept["out"] = inputs[0].detach()[0], output.detach().requires_grad_()
        return kept["out"]

    handle, found = projection.module.register_forward_hook(keep), []
    try:
        for part in tokens.split(chunk):
            logits = model(part[None]).logits[0, :-1].float()
            loss = nn.functional.cross_entropy(logits, part[1:], reduction="sum")
            found.append(float(loss.detach()) / (len(part) - 1))
            if rule != "none":
                (gradient,) = torch.autograd.grad(loss, kept["out"])
                write(weight, kept["keys"], -step * gradient[0], rule, ridge)
    finally:
        handle.remove()
        weight.copy_(before)
    return found


def article(characters: int) -> str:
    """The first long article of those that the package `gensim` carries."""
    return next(text for text in read_texts(wikipedia_file()) if len(text) > characters)


def main(
    text: Annotated[Path | None, typer.Option(help="A text file; else an article of gensim's.")] = None,
    layer: Annotated[int, typer.Option(help="Whose MLP is written.")] = 20,
    chunks: Annotated[int, typer.Option(min=2, help="How many chunks are read.")] = 6,
    chunk: Annotated[int, typer.Option(min=2, help="Tokens of a chunk.")] = 256,
    step: Annotated[float, typer.Option(help="η of the ridge.")] = 100.0,
    sum_step: Annotated[float, typer.Option(help="η of the plain sum.")] = 0.1,
    ridge: Annotated[float, typer.Option(help="λ, in mean square lengths of the keys.")] = 1.0,
) -> None:
    """Read the text once for each rule, and print the perplexity of the first and of the later chunks."""
    model, tokenizer = load_model("smollm2", dtype=torch.float32)
    model.requires_grad_(False)
    read = text.read_text() if text else article(8 * chunk * chunks)
    tokens = tokenizer(read, return_tensors="pt").input_ids[0][: chunk * chunks]
    table = Table("rule", "all", "first half", "second half")
    for rule in RULES:
        size = sum_step if rule == "sum" else step
        values = losses(model, tokens, layer, rule, size, ridge, chunk)
        half = len(values) // 2
        parts = (values, values[:half], values[half:])
        table.add_row(rule, *(f"{math.exp(sum(part) / len(part)):.2f}" for part in parts))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
