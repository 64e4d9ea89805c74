"""What a model says to the questions of a case, and how likely the right answers are to it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from ..errors import EngramError
from ..hf.forward import target_predictions
from ..hf.tokens import Row, chat_text, check_length, context_length, encode_row, open_ids
from .answers import check_room, greedy, success
from .cases import Case, RippleTest

PROMPT, PARAPHRASE, GENERATION = "prompt", "paraphrase", "generation prompt"
PORTABILITY, LOCALITY = "portability", "locality"

# Written beyond the answer's own length: an answer may have words before it. Long answers are cut.
MORE_TOKENS, MOST_TOKENS = 8, 256


class ScoredAnswer(NamedTuple):
    """How likely an answer is: its tokens' mean log-probability, the tokens, and the likeliest instead."""

    mean: float
    tokens: list[int]
    likeliest: list[int]

    @property
    def share(self) -> float:
        """The share of the answer's tokens that are the likeliest, the right ones before them given."""
        return fmean(a == b for a, b in zip(self.tokens, self.likeliest, strict=True))


class Asked(NamedTuple):
    """A question of a case: what for, the right answer, the answer that it competes with, and its test."""

    aspect: str
    prompt: str
    right: str
    aliases: tuple[str, ...] = ()
    other: str | None = None
    test: RippleTest | None = None


@dataclass(frozen=True)
class Answer:
    """What a model said to one question.

    Attributes:
        aspect: "prompt", "paraphrase", "generation prompt", "portability" or "locality"; the last two with
            their groups.
        prompt: the question.
        right: the right answer.
        text: what the model wrote, always by the likeliest token.
        first: its first token.
        begins, contains, exact: whether the text begins with the right answer, holds it, or is it.
        overlap: the share of the answer's words that stand in the text, in their order.
        argmax: whether every token of the right answer is the likeliest, the right ones before it given.
        tokens: the share of its tokens that are.
        likeliest: the likeliest tokens in their places.
        log_probability: the mean over its tokens.
        margin: by how much it exceeds the other answer's, the truth's or the target's; None without one.
        judged: what a judge says, from 0 to 1; None without one.
        passed: whether the test that it stands for passes, or the prompt's fact is said, by the rule of a
            data set that has conditions; None of all other answers.
    """

    aspect: str
    prompt: str
    right: str
    text: str
    first: int
    begins: bool
    contains: bool
    exact: bool
    overlap: float
    argmax: bool
    tokens: float
    likeliest: list[int]
    log_probability: float
    margin: float | None
    judged: float | None = None
    passed: bool | None = None


@dataclass(frozen=True)
class Figures:
    """What was measured of one case in one state of the model.

    Attributes:
        answers: one for each question, in the case's order.
        fluency: mean entropy of n-grams of generated text in bits; None where none was generated.
        drift: measures of the rest of the model by name; empty where none was taken.
    """

    answers: list[Answer]
    fluency: float | None = None
    drift: dict[str, float] | None = None

    @property
    def aspects(self) -> list[str]:
        return list(dict.fromkeys(answer.aspect for answer in self.answers))

    def of(self, aspect: str) -> list[Answer]:
        """The answers of one aspect."""
        return [answer for answer in self.answers if answer.aspect == aspect]

    def mean(self, aspect: str, measure: str) -> float | None:
        """The mean of a measure over an aspect's questions; None where no question has it."""
        found = [getattr(answer, measure) for answer in self.of(aspect)]
        found = [float(value) for value in found if value is not None]
        return fmean(found) if found else None

    def likelier(self, aspect: str) -> float | None:
        """The share of an aspect's questions whose right answer is likelier than the other one."""
        margins = [answer.margin for answer in self.of(aspect) if answer.margin is not None]
        return fmean(margin > 0 for margin in margins) if margins else None

    def kept(self, before: Figures, aspect: str) -> dict[str, float]:
        """Shares of an aspect's questions that are answered as before: the first token, the whole text, and
        the likeliest tokens in the right answer's places."""
        pairs = list(zip(before.of(aspect), self.of(aspect), strict=True))
        tokens = [
            fmean(a == b for a, b in zip(old.likeliest, new.likeliest, strict=True)) for old, new in pairs
        ]
        return {
            "first_token_kept": fmean(old.first == new.first for old, new in pairs),
            "text_kept": fmean(old.text == new.text for old, new in pairs),
            "tokens_kept": fmean(tokens),
        }


def questions(case: Case) -> list[Asked]:
    """Everything that is asked of a case."""
    target, truth = case.edit.target, case.truth
    own = [(PROMPT, case.prompt), *((PARAPHRASE, text) for text in case.paraphrases)]
    own += [(GENERATION, text) for text in case.generation]
    return [
        *(Asked(aspect, prompt, target, (), truth) for aspect, prompt in own),
        *(
            Asked(_named(aspect, q.group), q.prompt, q.answer, q.aliases, other, q.test)
            for aspect, other, group in (
                (PORTABILITY, None, case.portability),
                (LOCALITY, target, case.neighbours),
            )
            for q in group
        ),
    ]


def measure(
    model, tokenizer, cases: Sequence[Case], batch_size: int = 32, chat: bool = False
) -> list[Figures]:
    """Ask all questions of all cases, in batches of texts of like length.

    Args:
        model: a causal language model, in the mode that it is in.
        tokenizer: its tokenizer.
        cases: what to ask.
        batch_size: texts a batch.
        chat: ask by the tokenizer's chat template, each prompt as what a user says.

    Returns:
        The figures of each case, without fluency, drift and judge.

    Raises:
        EngramError: a text is longer than the model's context, or a prediction is not finite.
    """
    asked = [questions(case) for case in cases]
    flat = [question for rows in asked for question in rows]
    prompts = {question.prompt: said(tokenizer, question.prompt, chat) for question in flat}
    pairs = [
        (prompts[question.prompt], answer)
        for question in flat
        for answer in (question.right, question.other)
        if answer is not None
    ]
    scores = score(model, tokenizer, pairs, batch_size)
    counts = {prompt: 0 for prompt in prompts.values()}
    for question in flat:
        prompt = prompts[question.prompt]
        counts[prompt] = max(counts[prompt], _written(len(scores[prompt, question.right].tokens)))
    written = dict(
        zip(counts, greedy(model, tokenizer, list(counts), list(counts.values()), batch_size), strict=True)
    )

    def answer(question: Asked) -> Answer:
        prompt = prompts[question.prompt]
        mine, text = scores[prompt, question.right], written[prompt]
        found = success(text.text, question.right, question.aliases)
        other = None if question.other is None else scores[prompt, question.other].mean
        return Answer(
            aspect=question.aspect,
            prompt=question.prompt,
            right=question.right,
            text=text.text,
            first=text.first,
            begins=found.begins,
            contains=found.contains,
            exact=found.exact,
            overlap=found.overlap,
            argmax=mine.tokens == mine.likeliest,
            tokens=mine.share,
            likeliest=mine.likeliest,
            log_probability=mine.mean,
            margin=None if other is None else mine.mean - other,
        )

    return [Figures([answer(question) for question in rows]) for rows in asked]


def score(
    model, tokenizer, pairs: Iterable[tuple[str, str]], batch_size: int = 32
) -> dict[tuple[str, str], ScoredAnswer]:
    """Score each answer after its prompt; the space between them is understood.

    Raises:
        EngramError: a text is longer than the model's context, or a prediction is not finite.
    """
    rows = [(pair, _encode(model, tokenizer, *pair)) for pair in dict.fromkeys(pairs)]
    rows.sort(key=lambda entry: len(entry[1].ids))
    answers = {}
    for at in range(0, len(rows), batch_size):
        batch = rows[at : at + batch_size]
        found = target_predictions(model, [row for _, row in batch])
        for (pair, row), (chosen, likeliest) in zip(batch, found, strict=True):
            answer = ScoredAnswer(chosen.mean().item(), row.ids[row.target :], likeliest)
            if not math.isfinite(answer.mean):
                raise EngramError(f"model: expected finite predictions after {pair[0]!r}, got {answer.mean}")
            answers[pair] = answer
    return answers


def too_long(model, tokenizer, case: Case, chat: bool = False) -> str | None:
    """Which question of a case does not fit into the model's context with its answer; None where all do."""
    limit = context_length(model)
    for question in questions(case) if limit is not None else ():
        prompt = said(tokenizer, question.prompt, chat)
        answers = [question.right, *filter(None, [question.other])]
        # No tokenizer makes more tokens than bytes, but for a few of its own.
        if len(prompt.encode()) + max(len(answer.encode()) for answer in answers) + 2 * MORE_TOKENS <= limit:
            continue
        try:
            right, *_ = [_encode(model, tokenizer, prompt, answer) for answer in answers]
            check_room(limit, prompt, open_ids(tokenizer, prompt), _written(len(right.ids) - right.target))
        except EngramError as error:
            return str(error)
    return None


def _written(length: int) -> int:
    """How many tokens a model writes where an answer has so many."""
    return min(length + MORE_TOKENS, MOST_TOKENS)


def _named(aspect: str, group: str) -> str:
    return f"{aspect}: {group}" if group else aspect


def said(tokenizer, prompt: str, chat: bool) -> str:
    """The prompt as the model reads it: itself, or as what a user says in a chat."""
    if not chat:
        return prompt
    if not getattr(tokenizer, "chat_template", None):
        raise EngramError("chat: expected a tokenizer with a chat template, got one without")
    return chat_text(tokenizer, [("user", prompt)])[0]


def _encode(model, tokenizer, prompt: str, answer: str) -> Row:
    return check_length(model, encode_row(tokenizer, prompt, "{}", answer), prompt, beside="the answer")
