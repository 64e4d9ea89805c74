"""What `train_larimar.py` measures: what a decoder says of facts that are in its memory alone.

Neither the decoder nor its conditioning was trained on them. An answer is *right* where its first token is
the target's; beside it stands the F1 of its words against the target's. Each question is asked of the decoder
with the fact's memory, of the bare decoder, and with the memory of another case, which shows what is read.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from engram_kernels.evaluation import Case
from engram_kernels.larimar import ScopedModel
from engram_kernels.larimar.reading import read_episode
from engram_kernels.larimar.scope import key_scores, stored_keys
from engram_kernels.memory import EpisodicMemory

# Prompts at a time.
_BATCH = 50


class Reply(NamedTuple):
    """What was said: the first token, and the text up to the first full stop or line's end."""

    first: int
    text: str


@dataclass(frozen=True)
class Score:
    """Shares over questions: of right first tokens, and the mean F1 of words.

    Attributes:
        first: answers whose first token is the target's.
        f1: mean F1 of words.
        count: how many questions.
    """

    first: float
    f1: float
    count: int


def say(scoped: ScopedModel, prompts: Sequence[str], readouts: Tensor | None, tokens: int = 8) -> list[Reply]:
    """Greedy answers to prompts, each by its readout; by the bare decoder where readouts is None."""
    answers: list[Reply | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in range(0, len(order), _BATCH):
        rows = order[at : at + _BATCH]
        given = None if readouts is None else readouts[rows]
        written = scoped.generate([prompts[row] for row in rows], given, max_new_tokens=tokens)
        for row, ids in zip(rows, written.tolist(), strict=True):
            text = scoped.tokenizer.decode(ids, skip_special_tokens=True)
            answers[row] = Reply(ids[0], text.strip().split("\n")[0].split(".")[0].strip())
    return answers


def word_f1(said: str, target: str) -> float:
    """F1 of the words of an answer against the target's, without case and punctuation."""
    mine, right = (Counter(_words(text)) for text in (said, target))
    shared = sum((mine & right).values())
    return 2 * shared / (sum(mine.values()) + sum(right.values())) if shared else 0.0


def score(scoped: ScopedModel, answers: Sequence[Reply], targets: Sequence[str]) -> Score:
    """Compare answers with targets.

    Raises:
        ValueError: no answers, or another number of targets.
    """
    firsts = [first_token_of(scoped, target) for target in targets]
    return Score(
        fmean(answer.first == first for answer, first in zip(answers, firsts, strict=True)),
        fmean(word_f1(answer.text, target) for answer, target in zip(answers, targets, strict=True)),
        len(answers),
    )


def first_token_of(scoped: ScopedModel, target: str) -> int:
    """The token that a target begins with, after a space."""
    return scoped.tokenizer(f" {target}", add_special_tokens=False)["input_ids"][0]


def single_edits(
    scoped: ScopedModel, cases: Sequence[Case], unseen: Sequence[bool], tokens: int = 8
) -> dict[str, dict[str, Score]]:
    """Write one fact, ask its prompt and its paraphrases; a memory a case.

    Args:
        scoped: model, tokenizers, detector.
        cases: the facts.
        unseen: of each case, whether its target was no target in training.
        tokens: of an answer.

    Returns:
        Scores by how it was asked ("memory", "scoped memory", "bare decoder", "another's memory") and what
        ("prompt", "paraphrase", and each on unseen targets). "memory" always reads; "scoped memory" leaves
        what the detector takes for another subject to the bare decoder.
    """
    asked = _questions(cases)
    questions = [question.text for question in asked]
    queries = scoped.encoder.encode(questions)
    keys = scoped.encoder.encode([case.edit.prompt_text for case in cases])
    values = scoped.encoder.encode([case.edit.target for case in cases])
    case_of = torch.tensor([question.case for question in asked])
    inside = scoped.detector((queries * keys[case_of]).sum(-1))
    readouts = _read_each(scoped, values[case_of], keys[case_of], queries)
    other = (case_of + len(cases) // 2) % len(cases)
    others = _read_each(scoped, values[other], keys[other], queries)
    said = {
        "memory": say(scoped, questions, readouts, tokens),
        "bare decoder": say(scoped, questions, None, tokens),
        "another's memory": say(scoped, questions, others, tokens),
    }
    said["scoped memory"] = [
        mine if inside[i] else bare
        for i, (mine, bare) in enumerate(zip(said["memory"], said["bare decoder"], strict=True))
    ]
    targets = [cases[question.case].edit.target for question in asked]
    groups = {
        "prompt": [not question.paraphrase for question in asked],
        "paraphrase": [question.paraphrase for question in asked],
        "prompt, unseen target": [unseen[q.case] and not q.paraphrase for q in asked],
        "paraphrase, unseen target": [unseen[q.case] and q.paraphrase for q in asked],
    }
    return {
        how: {
            group: score(scoped, _chosen(answers, members), _chosen(targets, members))
            for group, members in groups.items()
            if any(members)
        }
        for how, answers in said.items()
    }


def batch_edits(
    scoped: ScopedModel, cases: Sequence[Case], counts: Sequence[int], tokens: int = 8
) -> dict[int, dict[str, Score]]:
    """Write the first N facts into one memory, and ask all of them.

    Args:
        scoped: model, tokenizers, detector; its own memory stays as it is.
        cases: the facts, of different prompts.
        counts: the numbers N.
        tokens: of an answer.

    Returns:
        By N, scores for "prompt" and "paraphrase".
    """
    result = {}
    for count in counts:
        some = cases[:count]
        memory = _memory_of(scoped, some)
        asked = _questions(some)
        questions = [question.text for question in asked]
        readouts = memory.read(scoped.encoder.encode(questions))
        answers = say(scoped, questions, readouts, tokens)
        targets = [some[question.case].edit.target for question in asked]
        result[count] = {
            name: score(scoped, _chosen(answers, members), _chosen(targets, members))
            for name, members in (
                ("prompt", [not question.paraphrase for question in asked]),
                ("paraphrase", [question.paraphrase for question in asked]),
            )
        }
    return result


def forgetting(scoped: ScopedModel, cases: Sequence[Case], tokens: int = 8) -> dict[str, float]:
    """Write facts into one memory, forget every second one, and ask them all through the scope detector.

    Returns:
        Shares: of "kept" and "forgotten" facts that are told right "before" and "after"; of the forgotten
        ones answered, after, exactly as by the bare decoder ("forgotten as bare"); of the forgotten targets
        that the bare decoder says by itself ("forgotten, bare").
    """
    memory = _memory_of(scoped, cases)
    prompts, targets = [case.edit.prompt_text for case in cases], [case.edit.target for case in cases]
    bare = say(scoped, prompts, None, tokens)
    before = _answers_of(scoped, memory, prompts, bare, tokens)
    memory.forget(ids=list(range(0, len(cases), 2)))
    after = _answers_of(scoped, memory, prompts, bare, tokens)
    kept, gone = slice(1, None, 2), slice(0, None, 2)
    return {
        "kept, before": score(scoped, before[kept], targets[kept]).first,
        "kept, after": score(scoped, after[kept], targets[kept]).first,
        "forgotten, before": score(scoped, before[gone], targets[gone]).first,
        "forgotten, after": score(scoped, after[gone], targets[gone]).first,
        "forgotten, bare": score(scoped, bare[gone], targets[gone]).first,
        "forgotten as bare": fmean(a == b for a, b in zip(after[gone], bare[gone], strict=True)),
    }


def locality(scoped: ScopedModel, cases: Sequence[Case], tokens: int = 8) -> dict[str, float]:
    """Write each fact into a memory of its own, and ask about its neighbours.

    Returns:
        Shares: of neighbours "answered as bare", to the token, through the scope detector, and "without the
        detector"; of prompts, paraphrases and neighbours "in scope".
    """
    keys = scoped.encoder.encode([case.edit.prompt_text for case in cases])
    values = scoped.encoder.encode([case.edit.target for case in cases])
    asked = [(number, text.prompt) for number, case in enumerate(cases) for text in case.neighbours]
    rows = torch.tensor([number for number, _ in asked])
    prompts = [prompt for _, prompt in asked]
    queries = scoped.encoder.encode(prompts)
    inside = scoped.detector((queries * keys[rows]).sum(-1))
    bare = say(scoped, prompts, None, tokens)
    told = say(scoped, prompts, _read_each(scoped, values[rows], keys[rows], queries), tokens)
    questions = _questions(cases)
    own = scoped.encoder.encode([question.text for question in questions])
    own_inside = scoped.detector((own * keys[[question.case for question in questions]]).sum(-1)).tolist()
    return {
        "answered as bare": fmean(
            not hit or a == b for hit, a, b in zip(inside.tolist(), told, bare, strict=True)
        ),
        "without the detector": fmean(a == b for a, b in zip(told, bare, strict=True)),
        "neighbours in scope": inside.double().mean().item(),
        "prompts in scope": fmean(_chosen(own_inside, [not q.paraphrase for q in questions])),
        "paraphrases in scope": fmean(_chosen(own_inside, [q.paraphrase for q in questions])),
    }


class _Question(NamedTuple):
    case: int
    text: str
    paraphrase: bool


def _questions(cases: Sequence[Case]) -> list[_Question]:
    return [
        _Question(number, text, place > 0)
        for number, case in enumerate(cases)
        for place, text in enumerate((case.edit.prompt_text, *(case.paraphrases or case.generation)))
    ]


def _read_each(scoped: ScopedModel, values: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
    """Readouts of memories of one fact each."""
    model = scoped.model
    blocks = zip(*(rows.split(_BATCH) for rows in (values, keys, queries)), strict=True)
    readouts = [
        read_episode(
            value[:, None], key[:, None], query, query.new_ones(len(query), 1, dtype=torch.bool),
            model.memory, model.config.addressing,
        )[0]
        for value, key, query in blocks
    ]  # fmt: skip
    return torch.cat(readouts)


def _memory_of(scoped: ScopedModel, cases: Sequence[Case]) -> EpisodicMemory:
    """A memory with facts under their prompts, numbered."""
    config = scoped.model.config
    memory = EpisodicMemory(config.slots, scoped.model.memory.latent, ridge=config.ridge, seed=config.seed)
    values = scoped.encoder.encode([case.edit.target for case in cases])
    memory.to(values.device).write(
        values,
        keys=scoped.encoder.encode([case.edit.prompt_text for case in cases]),
        ids=list(range(len(cases))),
    )
    return memory


def _answers_of(
    scoped: ScopedModel, memory: EpisodicMemory, prompts: Sequence[str], bare: Sequence[Reply], tokens: int
) -> list[Reply]:
    queries = scoped.encoder.encode(prompts)
    inside = scoped.detector(key_scores(queries, stored_keys(memory))).tolist()
    told = say(scoped, prompts, memory.read(queries), tokens)
    return [mine if hit else other for hit, mine, other in zip(inside, told, bare, strict=True)]


def _chosen(items: Sequence, members: Sequence[bool]) -> list:
    return [item for item, chosen in zip(items, members, strict=True) if chosen]


def _words(text: str) -> list[str]:
    return text.lower().translate(str.maketrans("", "", string.punctuation)).split()
