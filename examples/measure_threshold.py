"""How well a memory tells questions about its facts from others, by its threshold.

    python examples/measure_threshold.py --data counterfact_dev.json

Facts are the prompts of CounterFact rows, some of them in each memory. A paraphrase of a fact's prompt is a
question about it; prompts and paraphrases of other rows are questions about others, many of one relation.
`docs/memory.md` shows the table. A file that is not here is looked for in the folder that ENGRAM_DATA names.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor

from engram_kernels.evaluation import read_cases
from engram_kernels.memory import EpisodicMemory, load_encoder


class Told(NamedTuple):
    """Shares of questions, as means over memories.

    Attributes:
        facts: in each memory.
        threshold: of the memories.
        first: questions whose own fact is ranked first.
        known: questions about the facts that score at least the threshold.
        unknown: other questions that score less.
        best: the mean of both shares with the threshold that is best in hindsight for each memory.
    """

    facts: int
    threshold: float
    first: float
    known: float
    unknown: float
    best: float


def measure(
    keys: Tensor, questions: Tensor, others: Tensor, counts: Sequence[int], memories: int
) -> list[Told]:
    """Fill memories with some of the facts, and ask about these and about others.

    Args:
        keys, questions: a fact and a question about it a row, [N, C].
        others: questions about something else, [M, C].
        counts: numbers of facts.
        memories: how many of each, of different facts.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for count in counts:
        rows = []
        for _ in range(memories):
            some = torch.randperm(len(keys), generator=generator)[:count]
            memory = EpisodicMemory(slots=1, latent=keys.shape[1])
            memory.write(keys[some], ids=range(count))
            own, strange = (memory.recall(asked, top=1) for asked in (questions[some], others))
            right = torch.tensor([best.score for (best,) in own])
            wrong = torch.tensor([best.score for (best,) in strange])
            first = sum(best.name == i for i, (best,) in enumerate(own)) / count
            known = sum(best.known for (best,) in own) / count
            unknown = 1 - sum(best.known for (best,) in strange) / len(others)
            rows.append((memory.threshold(), first, known, unknown, _best(right, wrong)))
        means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
        found.append(Told(count, *means))
    return found


def _best(right: Tensor, wrong: Tensor) -> float:
    """The largest mean of the two shares over all thresholds."""
    thresholds = torch.cat([right, wrong, wrong.max()[None] + 1])
    known = (right >= thresholds[:, None]).double().mean(-1)
    unknown = (wrong < thresholds[:, None]).double().mean(-1)
    return float(((known + unknown) / 2).max())


def main(
    data: Annotated[Path, typer.Option(help="Rows of CounterFact, JSON or JSON lines.")],
    rows: Annotated[int, typer.Option(min=2, help="How many rows; half of them are facts.")] = 800,
    memories: Annotated[int, typer.Option(min=1, help="Memories of each size.")] = 8,
    encoder: Annotated[str, typer.Option(help="minilm, a folder, or a Hub name.")] = "minilm",
) -> None:
    """Measure, and print a table."""
    folder = os.environ.get("ENGRAM_DATA")
    cases = read_cases(Path(folder) / data if folder and not data.exists() else data, 0, rows).cases
    encode = load_encoder(encoder).encode
    prompts = encode([case.prompt for case in cases])
    paraphrases = encode([(case.paraphrases or case.generation)[0] for case in cases])
    half = len(cases) // 2
    counts = [count for count in (1, 4, 16, 64, 256) if count <= half]
    others = torch.cat([prompts[half:], paraphrases[half:]])
    print("| facts | threshold | right fact first | known | unknown | mean of both | best in hindsight |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for row in measure(prompts[:half], paraphrases[:half], others, counts, memories):
        shares = (row.first, row.known, row.unknown, (row.known + row.unknown) / 2, row.best)
        print(
            f"| {row.facts} | {row.threshold:.2f} | " + " | ".join(f"{share:.3f}" for share in shares) + " |"
        )


if __name__ == "__main__":
    typer.run(main)
