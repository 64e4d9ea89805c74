"""Graft a skill: fine-tune a model on a few sentences of SST-2, find the 0.01 % of the weights that carry
what it learned, set them in the base model, and count right answers.

    python examples/graft_sst2.py                                       SmolLM2, one seed
    python examples/graft_sst2.py --seeds 3 --trec                      TREC too, and both in one model
    python examples/graft_sst2.py --model minilm --sparsity 1e-5        the encoder MiniLM, 106 weights
    python examples/graft_sst2.py --series refitted --rows 300          one way to graft, on fewer answers

SmolLM2 answers by the next word, MiniLM by the nearest of the labels' texts. Data:
`stsa.binary.{train,test}` (SST-2) and `TREC.{train,test}.all`, in the folder that ENGRAM_DATA names.
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
from engram_kernels.grafting.tasks import by_length, padded
from engram_kernels.memory import SentenceEncoder, load_encoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Data:
    """A labelled data set: files, a prompt and the word for each label, a text for each, examples a label."""

    train: str
    test: str
    template: str
    words: tuple[str, ...]
    texts: tuple[str, ...]
    shots: int


SST2 = Data(
    "stsa.binary.train",
    "stsa.binary.test",
    "Review: {} Sentiment: It was",
    (" terrible", " great"),
    ("a terrible movie", "a great movie"),
    64,
)
KINDS = ("a description", "an entity", "an abbreviation", "a person", "a place", "a number")
TREC = Data(
    "TREC.train.all",
    "TREC.test.all",
    "Question: {} Answer type:",
    (" description", " entity", " abbreviation", " human", " location", " number"),
    tuple(f"a question about {kind}" for kind in KINDS),
    32,
)


class NearestText:
    """Classification by an encoder: the label whose text's latent, of the base model, is nearest.

    It has what `PromptTask` has; latents are of length 1, and cosines are multiplied by 20.
    """

    def __init__(self, encoder: SentenceEncoder, texts: tuple[str, ...]):
        self.tokenizer = encoder.tokenizer
        self.labels = encoder.encode(list(texts)).clone()

    def batches(self, rows: list[tuple[int, str]], size: int, seed: int | None = None) -> list[dict]:
        encoded = [(label, self.tokenizer(text, truncation=True, max_length=128)) for label, text in rows]
        rows = [(label, tokens["input_ids"]) for label, tokens in encoded]
        return [
            {**padded([ids for _, ids in group]), "labels": torch.tensor([label for label, _ in group])}
            for group in by_length(rows, size, seed, lambda row: len(row[1]))
        ]

    def logits(self, model: SentenceEncoder, batch: dict) -> torch.Tensor:
        return 20 * model(batch["input_ids"], batch["attention_mask"]) @ self.labels.T

    def loss(self, model: SentenceEncoder, batch: dict) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.logits(model, batch), batch["labels"])


class Family:
    """A base model, how it answers, and how it is fine-tuned."""

    def __init__(self, name: str):
        self.name = name
        if name == "minilm":
            self.base, self.epochs, self.lr = load_encoder("minilm", device=DEVICE), 8, 1e-1
        else:
            self.base, self.tokenizer = load_model(name, dtype=torch.float32, device=DEVICE)
            self.epochs, self.lr = 4, 2e-2

    def task(self, data: Data) -> PromptTask | NearestText:
        if self.name == "minilm":
            return NearestText(self.base, data.texts)
        return PromptTask(self.tokenizer, data.template, data.words)


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


def fine_tune(base, task, rows, seed: int, epochs: int, lr: float, size: int = 8):
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

    def __init__(self, family: Family, data: Data, seed: int, folder: Path, rows: int | None, steps: int):
        self.family, self.base, self.data, self.seed = family, family.base, data, seed
        self.steps = steps
        self.folder = folder / family.name / f"{data.train.split('.')[0]}-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.task = family.task(data)
        self.train = few(read(data.train), data.shots, seed)
        everything = read(data.test)
        count = len(everything) if rows is None else min(rows, len(everything))
        self.test = self.task.batches(random.Random(0).sample(everything, count), 64)
        self.of = f"on {count} rows"
        self.done = self.folder / "results.json"
        self.results = json.loads(self.done.read_text()) if self.done.exists() else {}
        self.pre = {name: p.detach() for name, p in graftable_parameters(self.base).items()}
        self.ft: dict[str, torch.Tensor] = {}

    def tune(self) -> None:
        """Fine-tune, or read what was fine-tuned."""
        from safetensors.torch import load_file, save_file

        path = self.folder / "tuned.safetensors"
        if not path.exists():
            start = time.perf_counter()
            family = self.family
            model = fine_tune(self.base, self.task, self.train, self.seed, family.epochs, family.lr)
            self.note("seconds to fine-tune", time.perf_counter() - start)
            tensors = {name: model.get_parameter(name).detach().contiguous() for name in self.pre}
            save_file(tensors, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        tensors = load_file(path)
        self.ft = {name: tensors[name].to(DEVICE) for name in self.pre}

    def kept(self, name: str, sparsity: float, make: Callable[[], Graft]) -> Graft:
        """A graft from its folder, made where it is not there."""
        path = self.folder / f"{name}-{sparsity:g}".replace(" ", "-")
        if not path.exists():
            start = time.perf_counter()
            graft = make()
            self.note(f"seconds for {name} {sparsity:g}", time.perf_counter() - start)
            graft.save_pretrained(path)
        return Graft.from_pretrained(path)

    def learned(self, sparsity: float) -> Graft:
        batches = self.task.batches(self.train, 16)
        find = partial(localize, self.base, self.ft, batches, self.task.loss, sparsity, seed=self.seed)
        return self.kept("learned", sparsity, find)

    def layered(self, sparsity: float) -> Graft:
        """The graft of the largest changes, of each layer its share."""
        return localize(self.base, self.ft, sparsity=sparsity, recipe="largest")

    def refitted(self, sparsity: float) -> Graft:
        """The same positions with values that are trained for them."""
        return self.kept("refitted", sparsity, lambda: self.refit(self.layered(sparsity)))

    def random_refitted(self, sparsity: float) -> Graft:
        """Trained values at random positions."""
        return self.kept("random refitted", sparsity, lambda: self.refit(self.drawn(sparsity)))

    def learned_refitted(self, sparsity: float) -> Graft:
        """Trained values at the positions that were learned."""
        return self.kept("learned refitted", sparsity, lambda: self.refit(self.learned(sparsity)))

    def refit(self, graft: Graft) -> Graft:
        return graft.refit(self.base, self.epochs(), self.task.loss, self.steps)

    def epochs(self, size: int = 8) -> list[dict]:
        """Batches for all steps of a refit, drawn anew in each pass through the rows."""
        passes = range(-(-self.steps * size // len(self.train)))
        return [batch for i in passes for batch in self.task.batches(self.train, size, seed=i)]

    def largest(self, sparsity: float) -> Graft:
        """The graft of the largest changes of all layers together."""
        masks = ek.graft_top_k(list(self.pre.values()), list(self.ft.values()), self.count(sparsity))
        return self.masked(masks)

    def drawn(self, sparsity: float) -> Graft:
        """A graft of as many weights drawn at random."""
        generator = torch.Generator().manual_seed(self.seed)
        scores = [torch.rand(x.shape, generator=generator).to(x.device) for x in self.pre.values()]
        return self.masked(ek.top_k_mask(scores, self.count(sparsity)))

    SERIES = {  # noqa: RUF012
        "learned": learned,
        "largest": largest,
        "layered": layered,
        "random": drawn,
        "refitted": refitted,
        "learned refitted": learned_refitted,
        "random refitted": random_refitted,
    }

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
    model: Annotated[str, typer.Option(help="smollm2, minilm, or another language model.")] = "smollm2",
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 1,
    sparsity: Annotated[float, typer.Option(help="Share of the graftable weights; 1e-4 is 0.01 %.")] = 1e-4,
    series: Annotated[list[str] | None, typer.Option(help="Ways to graft; default: all.")] = None,
    curve: Annotated[bool, typer.Option(help="The last skill, seed 0, from 1 % to 0.001 %.")] = False,
    trec: Annotated[bool, typer.Option(help="A second skill, and both merged.")] = False,
    steps: Annotated[int, typer.Option(help="Of a refit, eight rows each.")] = 100,
    rows: Annotated[int | None, typer.Option(help="Test rows to use; default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for grafts, results and pictures.")] = Path("graft-sst2"),
) -> None:
    """Fine-tune, localise, graft, and count."""
    family = Family(model)
    if unknown := set(series or ()) - set(Run.SERIES):
        raise typer.BadParameter(f"series: expected of {', '.join(Run.SERIES)}, got {unknown}")
    for seed in range(seeds):
        runs = [Run(family, data, seed, out, rows, steps) for data in (SST2, TREC)[: 1 + trec]]
        for run in runs:
            report(run, sparsity, series or list(Run.SERIES))
        if trec:
            join(*runs, sparsity)
    if curve:
        run = Run(family, TREC if trec else SST2, 0, out, rows, steps)
        draw(run, series or list(Run.SERIES), out / "curve.png")
        plots.heat_map(run.layered(sparsity), out / "density.png")


def report(run: Run, sparsity: float, series: list[str]) -> None:
    """What each way to graft keeps of the fine-tuned accuracy."""
    run.tune()
    pre, tuned = run.measure("pre"), run.measure("fine-tuned", run.tuned)
    print(f"{run.folder.name}: base {pre['accuracy']:.3f}, fine-tuned {tuned['accuracy']:.3f}")
    for name in series:
        accuracy = run.measure(f"{name} {sparsity:g}", partial(Run.SERIES[name], run, sparsity))["accuracy"]
        print(f"  {name}: {accuracy:.3f}, {accuracy / tuned['accuracy']:.1%} of it", flush=True)


def draw(run: Run, series: list[str], path: Path) -> None:
    """Accuracy and calibration against sparsity."""
    run.tune()
    points = []
    for sparsity in filter(run.count, (1e-2, 1e-3, 1e-4, 1e-5)):  # where it is a weight or more
        for name in series:
            result = run.measure(f"{name} {sparsity:g}", partial(Run.SERIES[name], run, sparsity))
            points.append(plots.Point(name, sparsity, result["accuracy"], result["ece"]))
    for name, result in (
        ("pre-trained", run.measure("pre")),
        ("fine-tuned", run.measure("fine-tuned", run.tuned)),
    ):
        points.append(plots.Point(name, None, result["accuracy"], result["ece"]))
    plots.curve(points, path)


def join(sentiment: Run, questions: Run, sparsity: float) -> None:
    """Two skills in one model: refitted grafts merged, and the values of both refitted once more."""
    runs = (sentiment, questions)
    one, two = (run.refitted(sparsity) for run in runs)
    questions.note("overlap", one.overlap(two)._asdict())
    merged = Graft.merge([one, two])

    def refit() -> Graft:
        turns = zip(*(run.epochs() for run in runs), strict=False)
        batches = [
            batch | {"task": run.task} for turn in turns for run, batch in zip(runs, turn, strict=True)
        ]
        loss = lambda model, batch: batch["task"].loss(model, batch)  # noqa: E731
        return merged.refit(sentiment.base, batches, loss, 2 * sentiment.steps)

    for name, make in (
        ("merged", lambda: merged),
        ("merged refitted", lambda: questions.kept("merged refitted", sparsity, refit)),
    ):
        for run in runs:
            result = run.measure(f"{name} {sparsity:g}", make)
            print(f"{run.folder.name}: {name} {result['accuracy']:.3f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
