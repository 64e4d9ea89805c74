"""Ten thousand edits of one matrix, keys and residuals drawn, no model: seconds, memory, error.

    python bench/many_edits.py --out preconditioner.json

The same 10,000 twice: all at once, and as 100 batches of 100 of which each preserves those before it. The
baseline is what MEMIT's code does at each call, in fp64 as there: `torch.linalg.solve` of in × in, for keys
as columns. Each variant runs in a process of its own, whose peak memory beyond the inputs is read;
statistics are inverted before, as the package keeps them. Errors are against `Eᵀ K (λC + KᵀK)⁻¹` by a
Cholesky factorisation in fp64: of ΔW as both have it, and of what is in the fp32 weight afterwards. Of the
stream the baseline does the first batches alone, as each costs the same. Seconds are of the clock and of
the CPU, of which the second does not depend on what else a machine does.
"""

import json
import multiprocessing
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

import engram_kernels as ek

RIDGE = 20.0


def draw(width: int, count: int):
    """W fp32, K and E fp32, C fp64 of condition 1e3: keys of that covariance."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    scales = torch.logspace(0, -1.5, width, dtype=torch.float64)
    mirrors = [normal(width).double() for _ in range(8)]

    def turned(rows):
        for mirror in mirrors:
            rows = rows - torch.outer(rows @ mirror, mirror * (2 / mirror.dot(mirror)))
        return rows

    covariance = turned(turned(torch.diag(scales.square())).T)
    keys = torch.cat([turned(normal(1000, width).double() * scales).float() for _ in range(count // 1000)])
    return normal(width, width) * 0.02, keys, normal(count, width), (covariance + covariance.T) / 2


def exact(keys, residual, covariance, ridge=RIDGE):
    """Eᵀ K (λC + KᵀK)⁻¹ in fp64, by another route than either."""
    system, right = ridge * covariance, covariance.new_zeros(residual.shape[1], keys.shape[1])
    for key, wanted in zip(keys.split(2000), residual.split(2000), strict=True):
        system = system + key.double().T @ key.double()
        right = right + wanted.double().T @ key.double()
    return torch.cholesky_solve(right.T, torch.linalg.cholesky(system)).T


def memit(weight, keys, residual, covariance, preserved=0.0):
    """The lines of MEMIT's code, keys and residuals as columns."""
    columns, wanted = keys.T.double(), residual.T.double()
    adjusted = torch.linalg.solve(RIDGE * covariance + preserved + columns @ columns.T, columns)
    update = wanted @ adjusted.T
    weight += update.float()
    return update


def ours(weight, keys, residual, operator):
    left, right = operator.factors(weight, keys, residual=residual)
    ek.apply_low_rank_(weight, left, right)
    return left, right


def memory(name: str) -> float:
    """A line of what Linux says about this process, MB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) / 1024


def relative(found, truth) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def run(variant: str, width: int, count: int, batch: int, folder: str) -> None:
    """One variant; in a process of its own."""
    weight, keys, residual, covariance = draw(width, count)
    if variant == "truth":
        torch.save(exact(keys, residual, covariance), f"{folder}/truth.pt")
        return
    found, given = {}, weight.clone()
    worked = time.process_time()
    if not variant.startswith("memit"):
        statistics = ek.Covariance.from_second_moment(covariance, 1)
        found["statistics, CPU seconds, once a layer"] = time.process_time() - worked
        operator = ek.Preconditioner.from_covariance(statistics, ridge=RIDGE)
    Path("/proc/self/clear_refs").write_text("5")  # begin the peak anew
    before = memory("VmRSS")
    started, worked = time.perf_counter(), time.process_time()
    if variant == "memit, at once":
        update = memit(weight, keys, residual, covariance)
    elif variant == "ours, at once":
        left, right = ours(weight, keys, residual, operator)
    elif variant == "memit, a stream":
        preserved = torch.zeros_like(covariance)
        for number, part in enumerate(keys.split(batch)[:3]):
            begun = time.process_time()
            memit(weight, part, residual[number * batch : (number + 1) * batch], covariance, preserved)
            preserved += part.double().T @ part.double()
            found.setdefault("CPU seconds a batch", []).append(time.process_time() - begun)
    else:
        for part, wanted in zip(keys.split(batch), residual.split(batch), strict=True):
            begun = time.process_time()
            ours(weight, part, wanted, operator)
            operator = operator.preserve(part, 1.0 / RIDGE)
            found.setdefault("CPU seconds a batch", []).append(time.process_time() - begun)
    found["seconds"], found["CPU seconds"] = time.perf_counter() - started, time.process_time() - worked
    found["peak beyond the inputs, MB"] = memory("VmHWM") - before
    if variant.endswith("at once"):
        truth = torch.load(f"{folder}/truth.pt")
        update = update if variant.startswith("memit") else left.double() @ right.double()
        found["error of ΔW"] = relative(update, truth)
        found["error in the weight"] = relative(weight.double() - given, truth)
    elif variant.startswith("ours"):
        # With the ridge's weight on earlier keys the last Q⁻¹ is C + KᵀK/λ of all keys.
        probe = keys[:: max(1, count // 50)].double()
        whole = covariance + sum(part.double().T @ part.double() for part in keys.split(2000)) / RIDGE
        truth = torch.cholesky_solve(probe.T, torch.linalg.cholesky(whole)).T
        found["error of K Q after all batches"] = relative(operator.apply(probe), truth)
    Path(folder, "found.json").write_text(json.dumps(found))


def main(
    width: int = 4096,
    count: int = 10_000,
    batch: int = 100,
    out: Annotated[Path | None, typer.Option(help="JSON file for every figure.")] = None,
) -> None:
    """Measure, and print what was found."""
    import tempfile

    report = {"width": width, "count": count, "batch": batch, "threads": torch.get_num_threads()}
    report |= {"torch": torch.__version__}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for variant in ("truth", "memit, at once", "ours, at once", "memit, a stream", "ours, a stream"):
            process = context.Process(target=run, args=(variant, width, count, batch, folder))
            process.start()
            process.join()
            if process.exitcode:
                raise typer.Exit(process.exitcode)
            if variant == "truth":
                continue
            found = json.loads(Path(folder, "found.json").read_text())
            if "CPU seconds a batch" in found:
                each = sorted(found.pop("CPU seconds a batch"))
                found["median CPU seconds a batch"], found["longest"] = each[len(each) // 2], each[-1]
            report[variant] = found
            print(variant, json.dumps(found, ensure_ascii=False), flush=True)
    if out is not None:
        out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
