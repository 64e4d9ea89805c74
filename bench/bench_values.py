"""Seconds an edit of the value's optimisation: incremental and side by side, against upstream's loop.

    python bench/bench_values.py --data counterfact_dev.json --rows 20       SmolLM2 in fp32
    python bench/bench_values.py --data counterfact_dev.json --rows 2 --dtype bfloat16
    python bench/bench_values.py --shape gpt2-xl --rows 64 --plain 2 --device cuda

Upstream's algorithm, in our own writing: one edit at a time, in every step the whole model over whole texts,
with the logits of all tokens. Both find the values of the same rows in one run, one after the other, group by
group, and the values are compared. `--plain N` runs upstream's loop on the first N rows only. `--shape` is a
random model of that shape with random tokens: for devices, not for quality.
"""

import json
import os
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from engram_kernels._io import new_file
from engram_kernels.editing import Edit, Editor, load_model
from engram_kernels.editing.search.batching import EncodedEdit, encode_edit
from engram_kernels.editing.search.values import ValueOptions, find_values, value_groups
from engram_kernels.hf.projection import default_layer, output_projection
from engram_kernels.hf.tokens import Row, pad_rows

SHAPES = {"gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25}}


def plain_loop(
    model, projection, text: EncodedEdit, options: ValueOptions
) -> tuple[torch.Tensor, list[float]]:
    """Upstream's optimisation of one value: `δ` and the losses."""
    device = model.get_input_embeddings().weight.device
    rows = [*text.rewriting, text.kl_prompt]
    ids, mask = pad_rows([row.inputs for row in rows], device)
    delta = torch.zeros(projection.matrix.shape[0], device=device, requires_grad=True)
    start, unedited, losses = None, None, []
    targets = torch.full_like(ids, -100)
    for i, row in enumerate(text.rewriting):
        targets[i, row.target - 1 : len(row.ids) - 1] = torch.tensor(row.ids[row.target :])
    wanted = targets != -100

    def add(_module, _inputs, output):
        nonlocal start
        start = output[0, rows[0].subject].detach().float() if start is None else start
        output = output.clone()
        for i, row in enumerate(rows):
            output[i, row.subject] += delta.to(output.dtype)
        return output

    optimizer = torch.optim.Adam([delta], lr=options.learning_rate)
    hook = projection.module.register_forward_hook(add)
    for step in range(options.steps):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        predictions = torch.log_softmax(logits.float(), dim=-1)
        chosen = predictions.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * wanted
        nll = -(chosen.sum(1)[:-1] / wanted.sum(1)[:-1]).mean()
        answer = predictions[-1, len(text.kl_prompt.inputs) - 1]
        unedited = answer.detach() if unedited is None else unedited
        kl = torch.nn.functional.kl_div(unedited, answer, log_target=True, reduction="sum")
        loss = nll + options.kl_weight * kl + options.weight_decay * delta.norm() / start.norm() ** 2
        losses.append(loss.item())
        if losses[-1] < options.stop_loss or step == options.steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            delta *= (options.clamp * start.norm() / delta.norm()).clamp(max=1)
    hook.remove()
    return delta.detach(), losses


def counterfact_texts(path: Path, rows: int, dtype: torch.dtype, device: str):
    """SmolLM2 and the texts of the first rows."""
    folder = os.environ.get("ENGRAM_DATA")
    path = Path(folder) / path if folder and not path.exists() else path
    model, tokenizer = load_model("smollm2", dtype=dtype, device=device)
    prefixes = Editor(model, tokenizer).prefixes()
    cases = json.loads(path.read_text(encoding="utf-8"))[:rows]
    edits = [Edit(case["subject"], case["prompt"], case["target_new"]) for case in cases]
    return model, [encode_edit(model, tokenizer, edit, prefixes) for edit in edits]


def random_texts(shape: str, rows: int, dtype: torch.dtype, device: str):
    """A random model and random texts: prefixes of 0 to 12 tokens, a prompt of 9, a target of 2."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(**SHAPES[shape])
    with torch.device(device):
        model = transformers.GPT2LMHeadModel(config).to(dtype).eval()
    texts = []
    for number in range(rows):
        prompt = torch.randint(1000, 40000, (11,)).tolist()
        lengths = [0] + [6] * 10 + [12] * 10
        contexts = [Row([7] * n + prompt, n + 4, n + 9) for n in lengths]
        texts.append(EncodedEdit(Edit(f"subject {number}", "{} is", "so"), contexts, Row(prompt[:7], 4, 7)))
    return model, texts


def main(
    data: Annotated[Path | None, typer.Option(help="CounterFact rows, EasyEdit's layout.")] = None,
    rows: int = 20,
    plain: Annotated[int | None, typer.Option(help="Rows for upstream's loop; default: all.")] = None,
    dtype: str = "float32",
    device: str = "cpu",
    layer: int | None = None,
    steps: Annotated[int, typer.Option(help="Evaluations of the loss, at most.")] = ValueOptions.steps,
    batch: Annotated[int | None, typer.Option(help="Edits side by side; default: by device.")] = None,
    shape: str | None = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for every figure.")] = None,
) -> None:
    kind = getattr(torch, dtype)
    if shape is None:
        model, texts = counterfact_texts(data or Path("counterfact_dev.json"), rows, kind, device)
    else:
        model, texts = random_texts(shape, rows, kind, device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    projection = output_projection(model, default_layer(model) if layer is None else layer)
    options = ValueOptions(batch=batch, steps=steps)
    plain = len(texts) if plain is None else plain
    report = []
    for group in value_groups(texts, options, torch.device(device)):
        started = time.perf_counter()
        values = find_values(model, projection, [texts[i] for i in group], options)
        seconds = (time.perf_counter() - started) / len(group)
        for i, value in zip(group, values, strict=True):
            entry = {"row": i, "side_by_side": len(group), "incremental": seconds, "steps": len(value.losses)}
            if i < plain:
                started = time.perf_counter()
                delta, losses = plain_loop(model, projection, texts[i], options)
                entry |= {"plain": time.perf_counter() - started, "plain_steps": len(losses)}
                entry["difference"] = float((value.change - delta).norm() / delta.norm())
                entry["losses"] = [value.losses[-1], losses[-1]]
            report.append(entry)
            print(json.dumps(entry), flush=True)
    show(report, f"{shape or 'SmolLM2-135M'}, {dtype}, {device}, layer {projection.layer}")
    if out is not None:
        with new_file(out) as temporary:
            temporary.write_text(json.dumps({"torch": torch.__version__, "rows": report}, indent=2) + "\n")


def show(report: list[dict], title: str) -> None:
    table = Table("", "rows", "seconds an edit, mean", "median", title=title)
    both = [entry for entry in report if "plain" in entry]
    for name, entries in (("incremental", report), ("upstream's loop", both)):
        seconds = [entry["plain" if name != "incremental" else "incremental"] for entry in entries]
        if seconds:
            table.add_row(
                name,
                str(len(seconds)),
                f"{statistics.mean(seconds):.2f}",
                f"{statistics.median(seconds):.2f}",
            )
    if both:
        ratio = sum(entry["plain"] for entry in both) / sum(entry["incremental"] for entry in both)
        worst = max(entry["difference"] for entry in both)
        table.caption = (
            f"{ratio:.1f} times fewer seconds on the same rows; values differ by {worst:.0e} at most"
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
