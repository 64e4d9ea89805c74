"""A trainer and an inference process on one machine: after every step the trainer's changes go to the model
that serves, as a sparse delta through a folder.

    python examples/weight_sync.py                          SmolLM2, 200 steps, lr 1e-6, served in bf16
    python examples/weight_sync.py --steps 50 --lr 1e-5     more of the weights change in a step

The trainer keeps its weights in fp32 and trains them with AdamW on the sentences of SST-2; what is served is
their rounding to bf16, of which a step changes a small part. The inference process applies each delta, and at
the end takes some back and applies them again. What is printed: bytes a step against a whole copy,
milliseconds to detect, pack, apply and undo, against a whole copy and against a staging of NaN, and the share
of weights that changed. At the end both processes' weights are compared bit for bit.

Data: `stsa.binary.train` (SST-2), in the folder that ENGRAM_DATA names.
"""

import hashlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from engram_kernels._hashing import tensor_bytes
from engram_kernels.editing import load_model
from engram_kernels.grafting import DeltaReader, DeltaWriter

# Steps that the inference process takes back at the end.
BACK = 5


def sentences() -> list[str]:
    folder = Path(os.environ.get("ENGRAM_DATA", "../shared/data"))
    lines = (folder / "stsa.binary.train").read_text(encoding="latin-1").splitlines()
    return [line[2:] for line in lines]


def fingerprint(weights) -> str:
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(tensor_bytes(weight))
    return digest.hexdigest()


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def nan_staging(weight: torch.Tensor, at: torch.Tensor, values: torch.Tensor) -> None:
    """What vLLM does with a sparse patch: a whole tensor of NaN, copied where it is none."""
    staged = torch.full((weight.numel(),), float("nan"), dtype=weight.dtype)
    staged.index_copy_(0, at.long(), values)
    staged = staged.view(weight.shape)
    torch.where(staged.isnan(), weight, staged, out=weight)


def serve(folder: str, name: str, steps: int, threads: int, answers) -> None:
    """The inference process: follow the stream, then go back and forth once."""
    torch.set_num_threads(threads)
    from safetensors.torch import load_file

    model, _ = load_model(name, dtype=torch.bfloat16)
    reader = DeltaReader(folder, model, keep=BACK)
    apply = []
    while reader.number < steps:
        before = reader.number
        taken = seconds(reader.pull)
        if reader.number > before:
            apply.append(taken / (reader.number - before))
        else:
            time.sleep(0.005)
    served = [weight.detach() for weight in model.parameters()]
    final = fingerprint(served)
    undo = seconds(lambda: reader.rollback(steps - BACK)) / BACK
    reader.pull()
    again = fingerprint(served)
    # The last delta once more, as others would write it: what it sets is there already.
    tensors = load_file(Path(folder) / f"{steps:06d}.safetensors")
    names = [key.removesuffix(".indices") for key in tensors if key.endswith(".indices")]
    weights = dict(model.named_parameters())
    entries = [(weights[n].detach(), tensors[f"{n}.indices"], tensors[f"{n}.values"]) for n in names]
    staging = seconds(lambda: [nan_staging(*entry) for entry in entries])
    others = [weight.clone() for weight in served]
    whole = seconds(lambda: [a.copy_(b) for a, b in zip(served, others, strict=True)])
    answers.put(
        {"apply": apply, "undo": undo, "final": final, "again": again, "staging": staging, "copy": whole}
    )


def main(
    model: Annotated[str, typer.Option(help="A Hugging Face name, a folder, or smollm2.")] = "smollm2",
    steps: Annotated[int, typer.Option(help="Of training.")] = 200,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-6,
    batch: Annotated[int, typer.Option(help="Sentences a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a sentence.")] = 32,
    threads: Annotated[int, typer.Option(help="Of each process.")] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Train, send, apply."""
    if steps <= BACK:
        raise typer.BadParameter(f"steps: expected more than {BACK}, got {steps}")
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    trained, tokenizer = load_model(model, dtype=torch.bfloat16)
    texts, served_bytes = sentences(), sum(weight.nbytes for weight in trained.parameters())
    trained.float().train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=lr, weight_decay=0.0)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        writer, deltas, train = DeltaWriter(Path(place) / "deltas", trained, torch.bfloat16), [], []
        answers = context.Queue()
        arguments = (str(Path(place) / "deltas"), model, steps, threads, answers)
        server = context.Process(target=serve, args=arguments, daemon=True)
        server.start()
        for step in range(steps):
            rows = [texts[(step * batch + i) % len(texts)] for i in range(batch)]
            ids = [tokenizer(row)["input_ids"][:length] for row in rows]
            width = max(map(len, ids))
            tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids])
            known = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
            start = time.perf_counter()
            labels = tokens.masked_fill(known == 0, -100)
            loss = trained(input_ids=tokens, attention_mask=known, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            train.append(time.perf_counter() - start)
            deltas.append(writer.write(trained))
            if (step + 1) % 20 == 0 or step + 1 == steps:
                print(f"step {step + 1}: loss {loss.item():.3f}, {deltas[-1].entries:,} weights changed")
        while (found := _answer(answers, server)) is None:
            pass
        server.join()
    expected = fingerprint(weight.detach().bfloat16() for weight in trained.parameters())
    assert found["final"] == found["again"] == expected, "the served weights are not the trainer's"

    weights = sum(weight.numel() for weight in trained.parameters())
    middle = {name: statistics.median(getattr(delta, name) for delta in deltas) for name in deltas[0]._fields}
    figures = {
        "steps": steps,
        "lr": lr,
        "weights": weights,
        "changed": middle["entries"] / weights,
        "bytes": middle["bytes"],
        "whole bytes": served_bytes,
        "train ms": 1e3 * statistics.median(train),
        "detect ms": 1e3 * middle["detect"],
        "pack ms": 1e3 * middle["pack"],
        "apply ms": 1e3 * statistics.median(found["apply"]),
        "undo ms": 1e3 * found["undo"],
        "NaN staging ms": 1e3 * found["staging"],
        "whole copy ms": 1e3 * found["copy"],
    }
    for name, value in figures.items():
        print(f"{name:16} {value:,.4g}" if isinstance(value, float) else f"{name:16} {value:,}")
    print(
        f"a delta has {100 * figures['bytes'] / served_bytes:.2f} % of a whole copy's bytes; both ends agree"
    )
    if out is not None:
        out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _answer(answers, server):
    """What the inference process says, or None while it is at work."""
    import queue

    try:
        return answers.get(timeout=1)
    except queue.Empty:
        if not server.is_alive() and answers.empty():
            raise RuntimeError("the inference process ended without an answer") from None
        return None


if __name__ == "__main__":
    typer.run(main)
