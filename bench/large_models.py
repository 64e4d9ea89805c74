"""One matrix of a 70B model, and a checkpoint edited in its files: seconds and peak memory on a CPU.

    OMP_NUM_THREADS=1 nice python bench/large_models.py matrix --columns 28672 --keys 1 --keys 100
    OMP_NUM_THREADS=1 nice python bench/large_models.py invert --columns 7168
    OMP_NUM_THREADS=1 nice python bench/large_models.py checkpoint --model smollm2

Seconds are of this process's own CPU time, which other work on the machine does not change much. The matrix
is random, and so is its C⁻¹: dense and positive definite, of float64.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

import engram_kernels as ek

app = typer.Typer(add_completion=False)
Columns = Annotated[int, typer.Option(help="in.")]


def peak() -> float:
    """GB that this process has had in memory at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def told(what: str, begun: float) -> None:
    seconds = round(time.process_time() - begun, 2)
    line = {"what": what, "seconds": seconds, "peak_gb": round(peak(), 2)}
    print(json.dumps(line, ensure_ascii=False), flush=True)


@app.command()
def matrix(
    rows: Annotated[int, typer.Option(help="out.")] = 8192,
    columns: Columns = 28672,
    keys: Annotated[list[int], typer.Option(help="How many are written at once.")] = [1, 100],  # noqa: B006
) -> None:
    """P = K C⁻¹, the factors and the write of some keys into one bfloat16 matrix."""
    torch.manual_seed(0)
    weight = torch.empty(rows, columns, dtype=torch.bfloat16).normal_(std=0.02)
    told(f"a weight of {weight.nbytes / 1e6:.0f} MB", time.process_time())
    spread = torch.randn(columns, 8, dtype=torch.float64) / columns**0.5
    inverse = torch.empty(columns, columns, dtype=torch.float64)
    torch.mm(spread, spread.T, out=inverse)
    inverse.diagonal().add_(1.0)
    told(f"C⁻¹ of {inverse.nbytes / 1e9:.1f} GB", time.process_time())
    for count in keys:
        own, change = torch.randn(count, columns), torch.randn(count, rows)
        begun = time.process_time()
        own.double() @ inverse
        told(f"P of {count} keys", begun)
        begun = time.process_time()
        values = own @ weight.float().T + change
        told(f"their values in the unedited matrix, {count} keys", begun)
        begun = time.process_time()
        left, right = ek.low_rank_factors(weight, own, values, inverse_covariance=inverse)
        told(f"factors of {count} keys", begun)
        begun = time.process_time()
        ek.apply_low_rank_(weight, left, right)
        told(f"apply {count} keys", begun)


@app.command()
def invert(columns: Columns = 7168) -> None:
    """A second moment of float64 into its inverse: the time grows with in³, the memory with in²."""
    torch.manual_seed(0)
    inputs = torch.randn(64, columns, dtype=torch.float64)
    moment = inputs.T @ inputs
    moment.diagonal().add_(1.0)
    size, before, begun = moment.nbytes / 1e9, peak(), time.process_time()
    ek.Covariance.from_second_moment(moment, 64, overwrite=True)
    beside = (peak() - before) / size
    told(f"Covariance of {columns} dimensions, {size:.2f} GB a matrix, {beside:.2f} beside it", begun)


@app.command()
def checkpoint(model: Annotated[str, typer.Option(help="A folder or smollm2.")] = "smollm2") -> None:
    """A saved edit of one matrix: written into the checkpoint's files, and by loading and saving."""
    with tempfile.TemporaryDirectory() as folder:
        for way in ("make", "files", "load"):
            subprocess.run([sys.executable, __file__, "one-way", way, model, folder], check=True)


@app.command(hidden=True)
def one_way(way: str, model: str, folder: Path) -> None:
    """Each in a process of its own, for its peak."""
    from engram_kernels.editing import EditResult, edit_checkpoint, load_model
    from engram_kernels.editing.edit import Edit
    from engram_kernels.editing.writing.records import EditedModule, EditRecord, Write
    from engram_kernels.hf.checkpoints import save_model
    from engram_kernels.hf.projection import default_layer, output_projection

    begun = time.process_time()
    if way == "make":
        network, _ = load_model(model)
        projection = output_projection(network, default_layer(network))
        out, width = projection.matrix.shape
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(shape, generator=generator) / 99 for shape in ((out, 1), (1, width)))
        edited = EditedModule.of(projection)
        write = Write(projection.name, left, right, right, left.T.contiguous(), 0.0, (0,))
        record = EditRecord(
            Edit("A", "{} is", "B"), 0.0, 0.0, losses=[], key_norm=0.0, value_norm=0.0, change_norm=0.0,
            took=True, reached=[], undid=[],
        )  # fmt: skip
        EditResult([record], [write], [edited]).save_pretrained(folder / "edit")
        return
    edits, before = EditResult.from_pretrained(folder / "edit"), peak()
    if way == "files":
        edit_checkpoint(edits, model, folder / way)
    else:
        network, tokenizer = load_model(model)
        edits.apply(network)
        save_model(network, tokenizer, folder / way)
    size = sum(path.stat().st_size for path in (folder / way).glob("*.safetensors")) / 1e9
    told(f"{way}: a checkpoint of {size:.2f} GB, {peak() - before:.2f} GB beside the imports", begun)


if __name__ == "__main__":
    app()
