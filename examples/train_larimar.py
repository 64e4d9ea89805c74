"""Teach SmolLM2 to answer from an episodic memory, and ask it about facts that it was never trained on.

    python examples/train_larimar.py --out larimar              train, evaluate, write results.json
    python examples/train_larimar.py --out larimar --facts 500  a short look

Data: `counterfact_dev.json` and `known_1000.json`, in the folder that ENGRAM_DATA names. Rows 0 to 399 of
CounterFact are held back: their facts, subjects and some of their objects are never seen in training. The
other rows give prompts and paraphrases; their objects are drawn anew, so that nothing of the world helps to
answer, only the memory. MiniLM and SmolLM2 stay as they are; the projections between them are trained.
What is done already is read from --out. Runs on the CPU in fp32.
"""

import dataclasses
import json
import os
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import larimar_answers
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from engram_kernels.evaluation import read_cases
from engram_kernels.hf import loading
from engram_kernels.larimar import (
    EpisodeCollator,
    Fact,
    FactEpisodes,
    LarimarModel,
    Objective,
    ScopeDetector,
    ScopedModel,
    warm_start,
)
from engram_kernels.memory import load_encoder

HELD_BACK = 400


@dataclass(frozen=True)
class Recipe:
    """How the decoder is trained.

    Attributes:
        facts: how many are learned from, each once.
        batch: facts a step.
        lr: the highest learning rate of AdamW.
        hidden: size of the conditioning's hidden layer.
        slots: of the memory; as many as a latent has entries.
        ridge: of the memory; of 0.01 to 1 the best for 256 facts that are learned from.
        sizes: facts in a memory; one is drawn for each episode.
        objects: share of targets that are objects of the data sets.
        words: share that are words of the decoder's vocabulary; the rest are names of subjects.
        paraphrased: share of questions that are paraphrases, where the data has one.
        warm_start: steps in which the hidden layer learns first tokens, without the decoder.
        save_steps: steps between checkpoints.
        held_objects: how many objects of the rows held back are never a target.
        seed: of everything drawn.
    """

    facts: int = 10000
    batch: int = 16
    lr: float = 1e-3
    hidden: int = 1024
    slots: int = 384
    ridge: float = 0.1
    sizes: tuple[int, ...] = (1, 1, 4, 16)
    objects: float = 0.5
    words: float = 0.35
    paraphrased: float = 0.6
    warm_start: int = 500
    save_steps: int = 125
    held_objects: int = 40
    seed: int = 0


def read(name: str) -> list[dict]:
    folder = Path(os.environ.get("ENGRAM_DATA", "../shared/data"))
    return json.loads((folder / name).read_text())


class Data:
    """The rows held back, and what may be learned from."""

    def __init__(self, recipe: Recipe, tokenizer):
        rows = read("counterfact_dev.json")
        held, self.rows = rows[:HELD_BACK], rows[HELD_BACK:]
        subjects = {row["subject"].lower() for row in held}
        self.rows = [row for row in self.rows if row["subject"].lower() not in subjects]
        self.known = [row for row in read("known_1000.json") if row["subject"].lower() not in subjects]
        objects = {row[field] for row in self.rows for field in ("target_new", "ground_truth")}
        objects |= {row["attribute"] for row in self.known}
        asked = sorted({row["target_new"] for row in held})
        generator = random.Random(recipe.seed)
        self.unseen = set(generator.sample(asked, min(recipe.held_objects, len(asked)))) | (
            set(asked) - objects
        )
        self.objects = sorted(filter(self._may_be_seen, objects))
        names = {row["subject"] for row in (*self.rows, *self.known)}
        self.tokenizer = tokenizer
        self.subjects = sorted(name for name in names if self._may_be_seen(name) and self._tokens(name) <= 5)
        parts = {word for text in self.unseen for word in text.split()}
        words = (re.fullmatch(r"Ġ([A-Za-z]{2,})", token) for token in tokenizer.get_vocab())
        self.words = sorted(word[1] for word in words if word and word[1] not in parts)
        self.names = [word for word in self.words if re.fullmatch("[A-Z][a-z]{2,}", word)]

    def _may_be_seen(self, text: str) -> bool:
        return not any(re.search(rf"\b{re.escape(unseen)}\b", text) for unseen in self.unseen)

    def _tokens(self, text: str) -> int:
        return len(self.tokenizer(text)["input_ids"])

    def facts(self, recipe: Recipe) -> list[Fact]:
        """Prompts with objects drawn at random, batches of like length in a row."""
        generator = random.Random(recipe.seed)
        prompts = [(row["prompt"], row["rephrase_prompt"]) for row in self.rows]
        prompts += [(row["prompt"], None) for row in self.known]
        facts = []
        for _ in range(recipe.facts):
            prompt, paraphrase = generator.choice(prompts)
            kind = generator.random()
            pool = self.objects if kind < recipe.objects else self.names
            pool = pool if kind < recipe.objects + recipe.words else self.subjects
            asked = paraphrase if paraphrase and generator.random() < recipe.paraphrased else None
            facts.append(Fact(prompt, generator.choice(pool), asked))
        ordered, block = [], 16 * recipe.batch
        for at in range(0, len(facts), block):
            some = sorted(
                facts[at : at + block], key=lambda fact: self._tokens(f"{fact.asked} {fact.target}")
            )
            batches = [some[i : i + recipe.batch] for i in range(0, len(some), recipe.batch)]
            generator.shuffle(batches)
            ordered += [fact for batch in batches for fact in batch]
        return ordered


class Latents:
    """Texts to latents, read from a file where they were computed before."""

    def __init__(self, encoder, path: Path):
        self.encoder, self.path = encoder, path

    def __call__(self, texts: list[str]) -> torch.Tensor:
        listed = self.path.with_suffix(".json")
        if listed.exists() and json.loads(listed.read_text()) == texts:
            return load_file(self.path)["latents"]
        latents = torch.cat(
            [self.encoder.encode(texts[at : at + 256]).detach() for at in range(0, len(texts), 256)]
        )
        save_file({"latents": latents}, self.path)
        listed.write_text(json.dumps(texts))
        return latents


def train(recipe: Recipe, data: Data, out: Path, tokenizer, encoder, decoder) -> tuple[LarimarModel, dict]:
    """Train the conditioning, from the last checkpoint where there is one."""
    start = time.perf_counter()
    torch.manual_seed(recipe.seed)
    model = LarimarModel.from_bases(
        encoder.model,
        decoder,
        slots=recipe.slots,
        ridge=recipe.ridge,
        hidden=recipe.hidden,
        seed=recipe.seed,
    )
    model.config.encoder_name, model.config.decoder_name = "minilm", loading.DEMO_MODEL
    model.objective = Objective()
    checkpoint = get_last_checkpoint(out / "checkpoints") if (out / "checkpoints").is_dir() else None
    episodes = FactEpisodes(
        data.facts(recipe), Latents(encoder, out / "facts.safetensors"), recipe.sizes, recipe.seed
    )
    notes = {"seconds to encode": time.perf_counter() - start}
    if checkpoint is None and recipe.warm_start:
        start = time.perf_counter()
        texts = data.words + data.objects
        latents = Latents(encoder, out / "words.safetensors")(texts)
        firsts = [tokenizer(f" {text}", add_special_tokens=False)["input_ids"][0] for text in texts]
        embeddings = decoder.get_input_embeddings().weight.detach()
        loss = warm_start(
            model.conditioning, latents, torch.tensor(firsts), embeddings, recipe.warm_start, seed=recipe.seed
        )
        notes |= {"warm start, loss": loss, "warm start, seconds": time.perf_counter() - start}
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=recipe.batch,
        num_train_epochs=1,
        learning_rate=recipe.lr,
        lr_scheduler_type="linear",
        warmup_steps=20,
        weight_decay=0.01,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        save_steps=recipe.save_steps,
        save_total_limit=2,
        logging_steps=25,
        remove_unused_columns=False,
        report_to=[],
        seed=recipe.seed,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=episodes, data_collator=EpisodeCollator(tokenizer)
    )
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    notes["seconds to train"] = time.perf_counter() - start
    notes["resumed at"] = checkpoint and Path(checkpoint).name
    notes["losses"] = [
        (entry["step"], round(entry["loss"], 4)) for entry in trainer.state.log_history if "loss" in entry
    ]
    return model.eval(), notes


def calibrate(data: Data, encoder) -> ScopeDetector:
    """A threshold between the paraphrases of training prompts, and the prompts about other subjects."""
    keys, own, other = (
        encoder.encode([row[field] for row in data.rows])
        for field in ("prompt", "rephrase_prompt", "locality_prompt")
    )
    return ScopeDetector.calibrate((keys * own).sum(-1), (keys * other).sum(-1))


def measure(scoped: ScopedModel, data: Data, rows: int, counts: list[int]) -> dict:
    """Every figure, of the rows held back."""
    folder = Path(os.environ.get("ENGRAM_DATA", "../shared/data"))
    cases = read_cases(folder / "counterfact_dev.json", rows=rows, skip_bad=True).cases
    unseen = [case.edit.target in data.unseen for case in cases]
    prompts = {case.edit.prompt_text: case for case in cases}
    cases_once = list(prompts.values())
    single = larimar_answers.single_edits(scoped, cases, unseen)
    batch = larimar_answers.batch_edits(scoped, cases_once, [n for n in counts if n <= len(cases_once)])
    return {
        "cases": len(cases),
        "unseen targets": sum(unseen),
        "threshold": scoped.detector.threshold,
        "single edits": {
            how: {what: dataclasses.asdict(score) for what, score in scores.items()}
            for how, scores in single.items()
        },
        "facts in one memory": {
            count: {what: dataclasses.asdict(score) for what, score in scores.items()}
            for count, scores in batch.items()
        },
        "forgetting": larimar_answers.forgetting(scoped, cases_once[: min(64, len(cases_once))]),
        "locality": larimar_answers.locality(scoped, cases),
    }


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, the model and results.json.")] = Path(
        "larimar"
    ),
    facts: Annotated[int, typer.Option(help="How many facts are learned from.")] = Recipe.facts,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = Recipe.lr,
    rows: Annotated[int, typer.Option(help="Rows held back to be asked.")] = HELD_BACK,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
) -> None:
    """Train, evaluate, and write the figures."""
    recipe = Recipe(facts=facts, lr=lr, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    decoder, tokenizer = loading.load_model(loading.DEMO_MODEL)
    encoder = load_encoder("minilm")
    data = Data(recipe, tokenizer)
    results = {"recipe": dataclasses.asdict(recipe), "threads": torch.get_num_threads()}
    trained = (out / "model").exists()
    if trained:
        results["training"] = json.loads((out / "training.json").read_text())
        model = LarimarModel.from_pretrained(out / "model", encoder=encoder.model, decoder=decoder)
    else:
        model, results["training"] = train(recipe, data, out, tokenizer, encoder, decoder)
        (out / "training.json").write_text(json.dumps(results["training"], indent=2) + "\n")
    scoped = ScopedModel(model, tokenizer, encoder, calibrate(data, encoder))
    if not trained:
        scoped.save_pretrained(out / "model")
    start = time.perf_counter()
    results |= measure(scoped, data, rows, [1, 16, 64, 256])
    results["seconds to evaluate"] = time.perf_counter() - start
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps({name: results[name] for name in ("single edits", "forgetting", "locality")}, indent=2))


if __name__ == "__main__":
    typer.run(main)
