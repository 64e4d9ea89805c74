"""Graft a skill: fine-tune SmolLM2 on a few sentences of SST-2, find the 0.01 % of the weights that carry
what it learned, set them in the base model, and count right answers.

    python examples/graft_sst2.py                                  one seed
    python examples/graft_sst2.py --seeds 3 --curve --trec --out out   what docs/grafting.md shows

Data: `stsa.binary.{train,test}` (SST-2) and `TREC.{train,test}.all`, in the folder that ENGRAM_DATA names.
Runs on CUDA where there is a GPU, else on the CPU, in fp32. What is done already is read from --out.
"""

import copy
import json
import os
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

import engram_kernels as ek
from engram_kernels.editing import load_model
from engram_kernels.grafting import (
    Graft,
    PromptTask,
    classification_score,
    graftable_parameters,
    localize,
    plots,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Data:
    """A labelled data set as prompts: files, template, the word for each label, examples a label."""

    train: str
    test: str
    template: str
    words: tuple[str, ...]
    shots: int


SST2 = Data(
    "stsa.binary.train", "stsa.binary.test", "Review: {} Sentiment: It was", (" terrible", " great"), 64
)
TREC_WORDS = (" description", " entity", " abbreviation", " human", " location", " number")
TREC = Data("TREC.train.all", "TREC.test.all", "Question: {} Answer type:", TREC_WORDS, 32)


def read(name: str) -> list[tuple[int, str]]:
    folder = Path(os.environ.get("ENGRAM_DATA", "../shared/data"))
    lines = (folder / name).read_text(encoding="latin-1").splitlines()
    return [(int(line[0]), line[2:].strip()) for line in lines if line.strip()]


def few(rows: list[tuple[int, str]], shots: int, seed: int) -> list[tuple[int, str]]:
    """The same number of rows of each label, drawn by a seed."""
    rows, seen, chosen = random.Random(seed).sample(rows, len(rows)), {}, []
    for label, text in rows:
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= shots:
            chosen.append((label, text))
    return chosen


def fine_tune(base, task: PromptTask, rows, seed: int, epochs: int = 4, lr: float = 2e-2, size: int = 8):
    """Plain SGD over the graftable weights, the learning rate falling to 0, gradients clipped at norm 1."""
    model = copy.deepcopy(base)
    names = set(graftable_parameters(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr)
    steps = epochs * -(-len(rows) // size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for epoch in range(epochs):
        for batch in task.batches(rows, size, seed=1000 * seed + epoch):
            loss = task.loss(model, {key: value.to(DEVICE) for key, value in batch.items()})
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    return model


class Run:
    """One seed of one data set: the fine-tuned model, its grafts, and their accuracy; kept in a folder."""

    def __init__(self, base, tokenizer, data: Data, seed: int, folder: Path, rows: int | None = None):
        self.base, self.data, self.seed = base, data, seed
        self.folder = folder / f"{data.train.split('.')[0]}-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.task = PromptTask(tokenizer, data.template, data.words)
        self.train = few(read(data.train), data.shots, seed)
        everything = read(data.test)
        count = len(everything) if rows is None else min(rows, len(everything))
        self.test = self.task.batches(random.Random(0).sample(everything, count), 64)
        self.of = f"on {count} rows"
        self.done = self.folder / "results.json"
        self.results = json.loads(self.done.read_text()) if self.done.exists() else {}
        self.pre = {name: p.detach() for name, p in graftable_parameters(base).items()}
        self.ft: dict[str, torch.Tensor] = {}

    def tune(self) -> None:
        """Fine-tune, or read what was fine-tuned."""
        from safetensors.torch import load_file, save_file

        path = self.folder / "tuned.safetensors"
        if not path.exists():
            start = time.perf_counter()
            model = fine_tune(self.base, self.task, self.train, self.seed)
            self.note("seconds to fine-tune", time.perf_counter() - start)
            tensors = {name: model.get_parameter(name).detach().contiguous() for name in self.pre}
            save_file(tensors, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        tensors = load_file(path)
        self.ft = {name: tensors[name].to(DEVICE) for name in self.pre}

    def learned(self, sparsity: float) -> Graft:
        path = self.folder / f"graft-{sparsity:g}"
        if not path.exists():
            start = time.perf_counter()
            batches = self.task.batches(self.train, 16)
            graft = localize(self.base, self.ft, batches, self.task.loss, sparsity, seed=self.seed)
            self.note(f"seconds to localise {sparsity:g}", time.perf_counter() - start)
            graft.save_pretrained(path)
        return Graft.from_pretrained(path)

    def largest(self, sparsity: float) -> Graft:
        """The graft of the largest changes."""
        masks = ek.graft_top_k(list(self.pre.values()), list(self.ft.values()), self.count(sparsity))
        return self.masked(masks)

    def drawn(self, sparsity: float) -> Graft:
        """A graft of as many weights drawn at random."""
        generator = torch.Generator().manual_seed(self.seed)
        scores = [torch.rand(x.shape, generator=generator).to(x.device) for x in self.pre.values()]
        return self.masked(ek.top_k_mask(scores, self.count(sparsity)))

    @property
    def masks(self) -> list[tuple[str, Callable[[float], Graft]]]:
        """Every way to choose the weights."""
        return [("learned", self.learned), ("largest changes", self.largest), ("random", self.drawn)]

    def count(self, sparsity: float) -> int:
        return round(sparsity * sum(x.numel() for x in self.pre.values()))

    def masked(self, masks) -> Graft:
        return Graft.from_masks(self.pre, self.ft, dict(zip(self.pre, masks, strict=True)))

    def measure(self, name: str, make: Callable[[], Graft] | None = None) -> dict:
        """Accuracy and calibration of the base, with a graft in it where one is made."""
        name = f"{name} {self.of}"
        if name not in self.results:
            with make().apply(self.base) if make else nullcontext():
                self.note(name, classification_score(self.base, self.test, self.task.logits)._asdict())
        return self.results[name]

    def note(self, name: str, value) -> None:
        self.results[name] = value
        self.done.write_text(json.dumps(self.results, indent=2) + "\n")
        print(self.folder.name, name, value, flush=True)

    def tuned(self) -> Graft:
        """All weights of the fine-tuned model, as a graft."""
        return self.masked([ek.pack_mask(torch.ones_like(x, dtype=torch.bool)) for x in self.pre.values()])


def main(
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 1,
    sparsity: Annotated[float, typer.Option(help="Share of the graftable weights; 1e-4 is 0.01 %.")] = 1e-4,
    curve: Annotated[bool, typer.Option(help="Seed 0 from 1 % to 0.001 %, on 300 test rows.")] = False,
    trec: Annotated[bool, typer.Option(help="A second skill, and both merged.")] = False,
    rows: Annotated[int | None, typer.Option(help="Test rows to use; default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for grafts, results and pictures.")] = Path("graft-sst2"),
) -> None:
    """Fine-tune, localise, graft, and count."""
    base, tokenizer = load_model("smollm2", dtype=torch.float32, device=DEVICE)
    runs = [Run(base, tokenizer, SST2, seed, out, rows) for seed in range(seeds)]
    for run in runs:
        run.tune()
        pre = runs[0].measure("pre")
        tuned = run.measure("fine-tuned", run.tuned)
        # Random weights leave the base as it is: once is enough.
        masks = run.masks if run.seed == 0 else run.masks[:-1]
        grafts = {name: run.measure(f"{name} {sparsity:g}", partial(make, sparsity)) for name, make in masks}
        kept = grafts["learned"]["accuracy"] / tuned["accuracy"]
        print(
            f"seed {run.seed}: base {pre['accuracy']:.3f}, fine-tuned {tuned['accuracy']:.3f}, "
            f"{kept:.1%} of it kept by {sparsity:.3%} of the weights; "
            + ", ".join(f"{name} {result['accuracy']:.3f}" for name, result in grafts.items()),
            flush=True,
        )
    plots.heat_map(runs[0].learned(sparsity), out / "density.png")
    if curve:
        draw(Run(base, tokenizer, SST2, 0, out, min(rows or 300, 300)), out / "curve.png")
    if trec:
        join(runs[0], Run(base, tokenizer, TREC, 0, out, rows), sparsity)


def draw(run: Run, path: Path) -> None:
    """Accuracy and calibration against sparsity: learned, largest and random masks."""
    run.tune()
    points = []
    for sparsity in filter(run.count, (1e-2, 1e-3, 1e-4, 1e-5)):  # where it is a weight or more
        for name, make in run.masks:
            result = run.measure(f"{name} {sparsity:g}", partial(make, sparsity))
            points.append(plots.Point(name, sparsity, result["accuracy"], result["ece"]))
    for name, result in (
        ("pre-trained", run.measure("pre")),
        ("fine-tuned", run.measure("fine-tuned", run.tuned)),
    ):
        points.append(plots.Point(name, None, result["accuracy"], result["ece"]))
    plots.curve(points, path)


def join(sentiment: Run, questions: Run, sparsity: float) -> None:
    """Two skills in one model."""
    questions.tune()
    questions.measure("pre")
    questions.measure("fine-tuned", questions.tuned)
    one, two = sentiment.learned(sparsity), questions.learned(sparsity)
    merged = Graft.merge([one, two])
    questions.note("overlap", one.overlap(two)._asdict())
    for run, graft in ((sentiment, one), (questions, two)):
        own = run.measure(f"learned {sparsity:g}", lambda graft=graft: graft)
        both = run.measure(f"merged {sparsity:g}", lambda: merged)
        print(f"{run.data.train}: own graft {own['accuracy']:.3f}, merged {both['accuracy']:.3f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
