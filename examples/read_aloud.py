"""What a memory makes a frozen decoder say, without any training: whole answers on rows of CounterFact.

    python examples/read_aloud.py --data counterfact_dev.json --report read_aloud.json

A fact is written as its object under its prompt. An answer runs to its first punctuation, and is right
where it is the object, without case; beside it stand the share of right first tokens and the F1 of words.
`read` is what the memory gives before the decoder speaks. Baselines: the fact as a sentence in the prompt,
the object of the nearest key, the bare decoder. A file that is not here is looked for in the folder that
ENGRAM_DATA names.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Annotated

import typer
from larimar_answers import word_f1

from engram_kernels._io import write_json
from engram_kernels.editing import Editor
from engram_kernels.evaluation import Case, read_cases
from engram_kernels.hf.chat import chat_ids
from engram_kernels.hf.loading import load_model
from engram_kernels.larimar import ReadAloud
from engram_kernels.memory import EpisodicMemory, load_encoder

# Prompts at a time.
BATCH = 40


class Trial:
    """A decoder, an encoder, and the answers that were given already."""

    def __init__(self, encoder, decoder, tokenizer):
        self.encoder, self.decoder, self.tokenizer = encoder, decoder, tokenizer
        self.said: dict[tuple[str, str], str] = {}

    def memory(self, cases: Sequence[Case], slots: int = 384, ridge: float = 0.1) -> EpisodicMemory:
        """Objects under their prompts, numbered."""
        memory = EpisodicMemory(slots, self.encoder.latent, ridge=ridge)
        objects = [case.edit.target for case in cases]
        latents = (
            self.encoder.encode(texts) for texts in (objects, [case.edit.prompt_text for case in cases])
        )
        memory.write(*latents, ids=list(range(len(cases))), texts=objects)
        return memory

    def reader(self, memory: EpisodicMemory) -> ReadAloud:
        return ReadAloud(memory, self.encoder, self.decoder, self.tokenizer)

    def say(self, prompts: Sequence[str], words: Sequence[str]) -> list[str]:
        """What the decoder says with these words before it; the same is asked only once."""
        reader = self.reader(EpisodicMemory(1, self.encoder.latent))
        new = sorted({*zip(prompts, words, strict=True)} - self.said.keys(), key=lambda pair: len(pair[0]))
        for at in range(0, len(new), BATCH):
            block = new[at : at + BATCH]
            self.said.update(zip(block, reader.say(*zip(*block, strict=True)), strict=True))
        return [self.said[pair] for pair in zip(prompts, words, strict=True)]

    def score(self, answers: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
        first = [
            self._first(answer) == self._first(target)
            for answer, target in zip(answers, targets, strict=True)
        ]
        return {
            "exact": fmean(a.lower() == t.lower() for a, t in zip(answers, targets, strict=True)),
            "first": fmean(first),
            "f1": fmean(word_f1(a, t) for a, t in zip(answers, targets, strict=True)),
            "count": len(answers),
        }

    def _first(self, text: str) -> list[int]:
        return self.tokenizer(f" {text}", add_special_tokens=False)["input_ids"][:1]

    def told(self, cases: Sequence[Case], prompts: Sequence[str]) -> list[str]:
        """The baseline: the whole fact in the prompt, which the decoder then continues."""
        reader, answers = self.reader(EpisodicMemory(1, self.encoder.latent)), []
        for at in range(0, len(prompts), BATCH):
            rows = [
                chat_ids(
                    self.tokenizer,
                    [{"role": "user", "content": f"{case.edit.prompt_text} {case.edit.target}."}],
                )
                + self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
                for case, prompt in zip(cases[at : at + BATCH], prompts[at : at + BATCH], strict=True)
            ]
            answers += reader.written(rows, 12)
        return answers


def same(texts: Sequence[str], others: Sequence[str]) -> float:
    return fmean(text == other for text, other in zip(texts, others, strict=True))


def questions(cases: Sequence[Case]) -> dict[str, tuple[list[Case], list[str]]]:
    """By kind, cases and what is asked about them."""
    pairs = {
        "prompt": [(case, case.edit.prompt_text) for case in cases],
        "paraphrase": [(case, text) for case in cases for text in case.paraphrases],
    }
    return {
        kind: ([case for case, _ in some], [" ".join(text.split()) for _, text in some])
        for kind, some in pairs.items()
    }


def main(
    data: Annotated[Path, typer.Option(help="Rows of CounterFact, JSON or JSON lines.")],
    rows: Annotated[int, typer.Option(help="Rows whose answers the decoder writes, the first ones.")] = 400,
    baseline: Annotated[int, typer.Option(help="Of these, rows that the baseline is asked.")] = 50,
    edits: Annotated[int, typer.Option(help="Edits by ROME to time; 0: none.")] = 3,
    report: Annotated[Path | None, typer.Option(help="JSON file for all figures.")] = None,
) -> None:
    """Measure, and print the figures."""
    folder = os.environ.get("ENGRAM_DATA")
    path = Path(folder) / data if folder and not data.exists() else data
    every = list({case.edit.prompt_text: case for case in read_cases(path, rows=1200).cases}.values())
    cases = every[:rows]
    named = {case.name for case in cases}
    decoder, tokenizer = load_model("smollm2")
    trial = Trial(load_encoder("minilm"), decoder, tokenizer)
    found: dict[str, dict] = {}

    def note(name: str, figures: dict) -> None:
        found[name] = figures
        print(name, {key: round(value, 3) for key, value in figures.items()}, flush=True)
        if report is not None:
            write_json(report, found)

    start = time.perf_counter()
    memory = trial.memory(cases[:64])
    note("seconds", {"an edit by memory": (time.perf_counter() - start) / 64})
    for kind, (asked, prompts) in questions(cases).items():
        targets = [case.edit.target for case in asked]
        note(f"one fact a memory, {kind}", trial.score(trial.say(prompts, targets), targets))
    for kind, (asked, prompts) in questions(cases[:baseline]).items():
        targets = [case.edit.target for case in asked]
        note(f"fact in the prompt, {kind}", trial.score(trial.told(asked, prompts), targets))
    loads = {f"{count} facts in one memory": count for count in (16, 64, 256)}
    loads |= {f"N/K = {share}": count for share, count in (("1/2", 192), ("1", 384), ("2", 768))}
    for name, count in loads.items():
        memory = trial.memory(every[:count])
        for kind, (asked, prompts) in questions(every[:count]).items():
            targets = [case.edit.target for case in asked]
            words = trial.reader(memory).read(prompts)
            figures = {"read": same(words, targets), "count": len(targets)}
            nearest = memory.recall(trial.encoder.encode(prompts), 1)
            figures["nearest key"] = same([best[0].entry.text for best in nearest], targets)
            some = [at for at, case in enumerate(asked) if case.name in named]
            answers = trial.say([prompts[at] for at in some], [words[at] for at in some])
            scores = trial.score(answers, [targets[at] for at in some])
            note(f"{name}, {kind}", {**figures, "exact": scores["exact"], "of": len(some)})
    for count in (10, 100, 1000):
        memory, first = trial.memory(every[:count]), every[: min(count, 100)]
        prompts, targets = [case.edit.prompt_text for case in first], [case.edit.target for case in first]
        words = trial.reader(memory).read(prompts)
        scores = trial.score(trial.say(prompts, words), targets)
        note(f"the first {len(first)} after {count} edits", {"read": same(words, targets), **scores})
    some = cases[:64]
    memory = trial.memory(some)
    prompts, targets = [case.edit.prompt_text for case in some], [case.edit.target for case in some]
    before = trial.say(prompts, trial.reader(memory).read(prompts))
    memory.forget(ids=list(range(0, len(some), 2)))
    after = trial.say(prompts, trial.reader(memory).read(prompts))
    note(
        "half of 64 forgotten",
        {
            "kept, before": trial.score(before[1::2], targets[1::2])["exact"],
            "kept, after": trial.score(after[1::2], targets[1::2])["exact"],
            "forgotten, before": trial.score(before[::2], targets[::2])["exact"],
            "forgotten, after": trial.score(after[::2], targets[::2])["exact"],
        },
    )
    if edits:
        editor = Editor(decoder, tokenizer)
        took = []
        for case in cases[:edits]:
            start = time.perf_counter()
            editor.edit(case.edit)
            took.append(time.perf_counter() - start)
        note(
            "seconds, ROME",
            {"the first, with the covariance": took[0], "median of the others": median(took[1:])},
        )


if __name__ == "__main__":
    typer.run(main)
