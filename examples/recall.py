"""What `measure_recall.py` measures: what an episodic memory recalls of facts, by latents alone.

Each fact has three texts: its prompt is the key, the prompt with the new answer is the value, and a
paraphrase of the prompt is the question. A fact is *recalled* where, of the values of all facts, the readout
is nearest to its own, by cosine; a tie is not recalled, nor is a readout of zeros. That is easy, since a
value repeats most of its question. So beside it stands the *choice*: whether the readout is nearer to the
prompt with the new answer than to the prompt with the true one, which an encoder alone gets wrong more often
than right. "No memory" is the question in place of a readout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engram_kernels.evaluation import Case
from engram_kernels.larimar import read_recursively
from engram_kernels.memory import EpisodicMemory, SentenceEncoder

VANISHING = 1e-6
LOADS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0, 5 / 4, 3 / 2, 2.0)
# Memories that are written at a time where each fact has one of its own.
_BATCH = 32


@dataclass(frozen=True)
class FactLatents:
    """Latents of facts, [N, C] each, on the CPU, where the memories are.

    Attributes:
        keys: of the prompts.
        values: of the prompts with the new answers.
        truths: of the prompts with the true answers.
        questions: of a paraphrase of each prompt.
    """

    keys: Tensor
    values: Tensor
    truths: Tensor
    questions: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: slice | Tensor) -> FactLatents:
        return FactLatents(*(getattr(self, field.name)[rows] for field in fields(self)))


class Recall(NamedTuple):
    """Shares of facts.

    Attributes:
        setting: what was done.
        facts: how many facts were asked.
        key: recalled by their own keys.
        question: recalled by a paraphrase.
        choice_key: the new answer chosen, asked by the key.
        choice_question: the same, asked by a paraphrase.
    """

    setting: str
    facts: int
    key: float
    question: float
    choice_key: float
    choice_question: float


class Load(NamedTuple):
    """A memory at one load.

    Attributes:
        series: how it is written and read.
        load: facts written for each slot, N/K.
        recall: what is recalled of them.
        leverages: of the facts written: least, mean, largest; None without a memory.
        ridge: λ; None without a memory.
    """

    series: str
    load: float
    recall: Recall
    leverages: tuple[float, float, float] | None
    ridge: float | None


def encode_cases(cases: Sequence[Case], encoder: SentenceEncoder) -> FactLatents:
    """Return the latents of cases; of several paraphrases the first is asked.

    Args:
        cases: as `read_cases` gives them.
        encoder: of the texts, on any device.

    Example:
        >>> facts = encode_cases(read_cases("counterfact.json", rows=384).cases, load_encoder("minilm"))
    """
    texts = {
        "keys": [case.edit.prompt_text for case in cases],
        "values": [f"{case.edit.prompt_text} {case.edit.target}" for case in cases],
        "truths": [f"{case.edit.prompt_text} {case.truth}" for case in cases],
        "questions": [(case.paraphrases or case.generation)[0] for case in cases],
    }
    return FactLatents(**{name: encoder.encode(asked).cpu() for name, asked in texts.items()})


def single(facts: FactLatents, slots: int, seed: int = 0) -> list[Recall]:
    """Write each fact into a memory of its own, and ask for it there, among the values of all facts.

    A memory of one fact answers every question with it: what this shows is that writing and reading are
    exact, not that questions about something else are left alone.
    """
    readouts = []
    for start in range(0, len(facts), _BATCH):
        some = facts[start : start + _BATCH]
        memory = EpisodicMemory(slots, facts.keys.shape[-1], batch=len(some), seed=seed)
        memory.write(some.values[:, None], keys=some.keys[:, None])
        asked = torch.stack([some.keys, some.questions], 1)
        readouts.append(memory.read(asked))
    by_key, by_question = torch.cat(readouts).unbind(1)
    return [
        _recall("one fact, one memory", by_key, by_question, facts, facts.values),
        _recall("no memory", facts.keys, facts.questions, facts, facts.values),
    ]


def sequential(facts: FactLatents, slots: int, checkpoints: Sequence[int], seed: int = 0) -> list[Recall]:
    """Write facts one after the other into one memory, and ask at checkpoints: all so far, and the first.

    Args:
        facts: to be written, in this order.
        slots: K.
        checkpoints: numbers of facts; the first is the number of first facts that are followed.
        seed: of the memory, whose ridge is chosen by leave-one-out.
    """
    stops = sorted({stop for stop in checkpoints if 0 < stop <= len(facts)})
    memory = EpisodicMemory(slots, facts.keys.shape[-1], ridge="loo", seed=seed)
    rows = []
    for number in range(len(facts)):
        one = facts[number : number + 1]
        memory.write(one.values, keys=one.keys, ids=[number])
        if number + 1 in stops:
            written = facts[: number + 1]
            rows.append(_ask(f"all {number + 1:,} so far", memory, written, written.values))
            first = facts[: stops[0]]
            rows.append(_ask(f"the first {stops[0]:,}, after {number + 1:,}", memory, first, written.values))
    return rows


def capacity(facts: FactLatents, slots: int, loads: Sequence[float] = LOADS, seed: int = 0) -> list[Load]:
    """Write facts at once, as many for each slot as `loads` say, and ask for all of them.

    Four series: "leave-one-out" and "vanishing ridge" are read by key; "by content" holds the values alone,
    without keys, and projects the question onto them; and "no memory".

    Args:
        facts: of which the first are written; loads beyond their number are left out.
        slots: K.
        loads: N/K.
        seed: of the memories.
    """
    latent, points = facts.keys.shape[-1], []
    counts = {round(load * slots): load for load in loads if 0 < round(load * slots) <= len(facts)}
    for count, load in counts.items():
        some = facts[:count]
        for series, ridge in (("leave-one-out", "loo"), ("vanishing ridge", VANISHING)):
            memory = EpisodicMemory(slots, latent, ridge=ridge, seed=seed)
            memory.write(some.values, keys=some.keys, ids=range(count))
            recall = _ask(series, memory, some, some.values)
            points.append(Load(series, load, recall, _leverages(memory, some.keys), float(memory.ridges)))
        memory = EpisodicMemory(slots, latent, seed=seed)
        memory.write(some.values)
        recall = _ask("by content", memory, some, some.values)
        points.append(Load("by content", load, recall, _leverages(memory, some.values), float(memory.ridges)))
        recall = _recall("no memory", some.keys, some.questions, some, some.values)
        points.append(Load("no memory", load, recall, None, None))
    return points


def forgetting(
    facts: FactLatents, slots: int, share: float = 0.5, ridge: float | str = "loo", seed: int = 0
) -> tuple[list[Recall], float]:
    """Write facts, forget a share of them, and ask for both parts, before and after.

    Beside it stands a memory in which the forgotten facts were never written.

    Args:
        facts: to be written.
        slots: K.
        share: of the facts to forget, chosen by seed; at least one is forgotten and one kept.
        ridge, seed: of the memories.

    Returns:
        Rows, and the relative difference of the memory after forgetting from the one that never knew, as
        ‖M − M'‖ / ‖M'‖.

    Raises:
        ValueError: `share` rounds to no facts, or to all.
    """
    count = round(share * len(facts)) if 0 < share < 1 else 0
    if not 0 < count < len(facts):
        raise ValueError(
            f"share: expected one that forgets some of the {len(facts)} facts and keeps some, got {share}"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(facts), generator=generator, device="cpu")
    gone, kept = order.split([count, len(facts) - count])
    parts = (("forgotten", facts[gone]), ("retained", facts[kept]))
    settings = {"ridge": ridge, "seed": seed}
    memory = EpisodicMemory(slots, facts.keys.shape[-1], **settings)
    memory.write(facts.values, keys=facts.keys, ids=range(len(facts)))
    rows = [_ask(f"{name}, before", memory, part, facts.values) for name, part in parts]
    memory.forget(ids=gone.tolist())
    rows += [_ask(f"{name}, after", memory, part, facts.values) for name, part in parts]
    never = EpisodicMemory(slots, facts.keys.shape[-1], **settings)
    never.write(facts.values[kept], keys=facts.keys[kept], ids=kept.tolist())
    rows += [_ask(f"{name}, never known", never, part, facts.values) for name, part in parts]
    forgotten = facts[gone]
    rows.append(_recall("forgotten, no memory", forgotten.keys, forgotten.questions, forgotten, facts.values))
    apart = torch.linalg.norm(memory.matrix() - never.matrix()) / torch.linalg.norm(never.matrix())
    return rows, float(apart)


@torch.no_grad()
def long_context(facts: FactLatents, slots: int, chunks: Sequence[int], seed: int = 0) -> list[Recall]:
    """Ask about all facts at once, many more than slots: one memory of all, and memories read recursively.

    Args:
        facts: of one long context.
        slots: K.
        chunks: facts a memory, of which a row each is made (`read_recursively`).
        seed: of the memories.
    """
    memory = EpisodicMemory(slots, facts.keys.shape[-1], seed=seed)
    memory.write(facts.values, keys=facts.keys)
    rows = [_ask("one memory", memory, facts, facts.values)]
    for chunk in chunks:
        by_key, by_question = (
            read_recursively(facts.values, asked, memory, facts.keys, chunk)
            for asked in (facts.keys, facts.questions)
        )
        rows.append(_recall(f"chunks of {chunk:,}, recursively", by_key, by_question, facts, facts.values))
    rows.append(_recall("no memory", facts.keys, facts.questions, facts, facts.values))
    return rows


def _ask(setting: str, memory: EpisodicMemory, facts: FactLatents, candidates: Tensor) -> Recall:
    readouts = (memory.read(asked) for asked in (facts.keys, facts.questions))
    return _recall(setting, *readouts, facts, candidates)


def _recall(
    setting: str, by_key: Tensor, by_question: Tensor, facts: FactLatents, candidates: Tensor
) -> Recall:
    readouts = (by_key, by_question)
    nearest = [_nearest(readout, facts.values, candidates) for readout in readouts]
    chosen = [_chosen(readout, facts) for readout in readouts]
    return Recall(setting, len(facts), *(float(right.double().mean()) for right in (*nearest, *chosen)))


def _nearest(readouts: Tensor, values: Tensor, candidates: Tensor) -> Tensor:
    """Whether a readout's own value, one of the candidates, is nearer to it than all others are."""
    readouts = readouts.double()
    values, candidates = (F.normalize(latents.double(), dim=-1) for latents in (values, candidates))
    lengths = torch.linalg.vector_norm(readouts, dim=-1, keepdim=True)
    # A readout of zeros has no direction: NaN, which is as near as nothing.
    readouts = readouts / lengths
    own = (readouts * values).sum(-1, keepdim=True)
    # The own value compares with itself only up to rounding.
    return (readouts @ candidates.mT >= own - 1e-12).sum(-1) == 1


def _chosen(readouts: Tensor, facts: FactLatents) -> Tensor:
    """Whether a readout is nearer to the new fact than to the true one."""
    readouts = readouts.double()
    new, true = (F.normalize(latents.double(), dim=-1) for latents in (facts.values, facts.truths))
    return (readouts * new).sum(-1) > (readouts * true).sum(-1)


def _leverages(memory: EpisodicMemory, keys: Tensor) -> tuple[float, float, float]:
    leverages = memory.leverage(keys)
    return float(leverages.min()), float(leverages.mean()), float(leverages.max())
