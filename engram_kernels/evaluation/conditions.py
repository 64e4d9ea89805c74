"""Tests that are asked only where a condition holds before the edit, as RippleEdits' own runner asks them.

A query is answered where each of its answers stands, under one of its names, in the prompt with what the
model writes after it by the likeliest token. It writes until there are as many tokens, the prompt's among
them, as the prompt has characters and 30 more (Cohen et al. 2024, arXiv 2307.12976, section 4, and its code).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..hf.tokens import open_ids
from .answers import greedy
from .cases import Case, Query, Question, RippleTest
from .measures import Figures, questions, said

ANSWER_LENGTH = 30


def settled(model, tokenizer, cases: Sequence[Case], batch_size: int = 32, chat: bool = False) -> list[Case]:
    """The cases without the questions whose condition the model, as it is, does not meet."""
    conditions = [query for case in cases for test in case.tests for query in test.conditions]
    answered = answers(model, tokenizer, conditions, batch_size, chat)

    def met(question: Question) -> bool:
        return question.test is None or all(answered[query] for query in question.test.conditions)

    return [
        replace(
            case,
            neighbours=tuple(filter(met, case.neighbours)),
            portability=tuple(filter(met, case.portability)),
        )
        if case.tests
        else case
        for case in cases
    ]


def with_passes(
    model, tokenizer, cases: Sequence[Case], figures: Sequence[Figures], batch_size: int = 32, chat=False
) -> list[Figures]:
    """The figures with what passes: the answer to the prompt, and the first answer of each test."""
    queries = [query for case in cases for test in case.tests for query in (_fact(case), *test.queries)]
    answered = answers(model, tokenizer, queries, batch_size, chat)

    def passing(case: Case, found: Figures) -> Figures:
        if not case.tests:
            return found
        passed: list[bool | None] = []
        seen: set[RippleTest] = set()
        for asked in questions(case):
            if asked.test is None or asked.test in seen:
                passed.append(None)
                continue
            seen.add(asked.test)
            each = [answered[query] for query in asked.test.queries]
            passed.append(all(each) if asked.test.every else any(each))
        passed[0] = answered[_fact(case)]
        pairs = zip(found.answers, passed, strict=True)
        return replace(found, answers=[replace(answer, passed=one) for answer, one in pairs])

    return [passing(case, found) for case, found in zip(cases, figures, strict=True)]


def answers(
    model, tokenizer, queries: Iterable[Query], batch_size: int = 32, chat: bool = False
) -> dict[Query, bool]:
    """Whether the model answers each query."""
    prompts = {query.prompt: said(tokenizer, query.prompt, chat) for query in queries}
    counts = [
        max(1, len(prompt) + ANSWER_LENGTH - len(open_ids(tokenizer, prompt))) for prompt in prompts.values()
    ]
    written = greedy(model, tokenizer, list(prompts.values()), counts, batch_size)
    texts = {prompt: prompt + text.text for prompt, text in zip(prompts, written, strict=True)}
    return {
        query: all(any(name in texts[query.prompt] for name in names) for names in query.answers)
        for query in queries
    }


def _fact(case: Case) -> Query:
    """The edit itself, asked as a query."""
    return Query(case.prompt, ((case.edit.target,),))
