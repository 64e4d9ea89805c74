"""Questions answered in sentences: by a language model that is told what a memory recalls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import nn

from .. import _checks as check
from ..hf.chat import chat_ids
from ..hf.generation import greedy
from ..memory.encoder import SentenceEncoder, warn_of_another
from ..memory.episodic import EpisodicMemory
from ..memory.ledger import Entry, Id
from ..memory.recall import PRIOR, STEP, Recalled
from .coverage import coverage, excerpts
from .grounding import first_sentence, grounded, has_sentence

if TYPE_CHECKING:
    from ..hf.tokens import Tokenizer

UNKNOWN = "I don't know."
TOLD = "You answer in one short sentence, only from what you were told."
ALONE = "You answer in one short sentence."
# Facts that the words of a question are compared with.
_CANDIDATES = 8
# The score from which on a fact answers a question; what it was chosen on: docs/larimar.md.
_ANSWERS = 0.45


class Told(NamedTuple):
    """A fact that a question may be about, as it was looked at.

    Attributes:
        recalled: what the memory says of it.
        passage: the part of it that the question is about; of a fact with a key, of its value.
        coverage: how near it comes to the question's least covered word.
    """

    recalled: Recalled
    passage: str
    coverage: float

    @property
    def score(self) -> float:
        """What facts are ranked by: the mean of cosine and coverage."""
        return (self.recalled.score + self.coverage) / 2


class Answer(NamedTuple):
    """A sentence, and where it comes from.

    Attributes:
        text: the answer.
        source: "memory": the model's words, all of which were told; "quote": the fact itself, where the
            model's words were not; "nothing": the memory does not know; "model": the model alone.
        facts: those that the question may be about, the best first; the first is what the model was told.
    """

    text: str
    source: Literal["memory", "quote", "nothing", "model"]
    facts: list[Told]


class Answerer:
    """A language model that answers from a memory, in words that stand there, and says what it does not know.

    A question goes to the memory first. Its nearest facts are ranked by the mean of cosine and `coverage`; of
    facts that begin alike, and so speak of one thing, the newest comes first. Then

    - where the best fact is nearer than the memory's facts are to each other, and covers the question, it is
      told to the model, whose first sentence is the answer, up to what was not told; where that leaves
      nothing, the fact is quoted;
    - where all facts are as far as those of another subject, the model answers alone, if it may;
    - else nothing is known.

    Args:
        memory: whose rows were written with ids and texts.
        encoder: what made its latents.
        decoder: a causal language model that was taught to converse.
        tokenizer: the decoder's.
        alone: whether the model answers by itself what the memory has nothing near to.
        number: of several memories, the one that is asked.
        where: which facts may be told, by id and entry; None: all.
        max_new_tokens: of an answer.

    Example:
        >>> answers = Answerer(memory, load_encoder("minilm"), *load_model("smollm2"))
        >>> answers("Who runs the bakery?").text
        'Marta Oduya runs the bakery on Linden Street.'

    Not run on a GPU.
    """

    def __init__(
        self,
        memory: EpisodicMemory,
        encoder: SentenceEncoder,
        decoder: nn.Module,
        tokenizer: Tokenizer,
        alone: bool = True,
        number: int = 0,
        where: Callable[[Id, Entry], bool] | None = None,
        max_new_tokens: int = 48,
    ):
        check.integer("max_new_tokens", max_new_tokens, at_least=1)
        warn_of_another(encoder, memory.encoder)
        self.memory = memory
        self.encoder = encoder
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.alone = alone
        self.number = number
        self.where = where
        self.max_new_tokens = max_new_tokens

    def __repr__(self) -> str:
        return f"Answerer({len(self.memory)} rows, {self.encoder!r}, {type(self.decoder).__name__})"

    def __call__(self, question: str) -> Answer:
        """Answer a question.

        Raises:
            ValueError: an empty question.
        """
        return self.answer([question])[0]

    def answer(self, questions: Sequence[str]) -> list[Answer]:
        """Answer questions, each for itself; the model writes all answers at once.

        Raises:
            TypeError: one text in place of a list.
            ValueError: an empty question.
        """
        check.several("questions", questions)
        found = [(question.strip(), self.recall(question)) for question in questions]
        prompts = [self._prompt(*asked) for asked in found]
        said = iter(self.say([prompt for prompt in prompts if prompt is not None]))
        return [
            Answer(UNKNOWN, "nothing", asked[1]) if prompt is None else _answer(*asked, prompt, next(said))
            for asked, prompt in zip(found, prompts, strict=True)
        ]

    def _prompt(self, question: str, facts: list[Told]) -> tuple[str, str] | None:
        """What the model hears, the system's and the user's part; None where nothing is known."""
        if facts and facts[0].score >= _ANSWERS and facts[0].recalled.score >= self.absent():
            return TOLD, f"{facts[0].passage}\n\n{question}"
        outside = all(fact.recalled.score < PRIOR for fact in facts)
        return (ALONE, question) if outside and self.alone else None

    def absent(self) -> float:
        """The cosine of a question that no fact answers, by leave-one-out of the memory's own keys."""
        return (self.memory.threshold(memory=self.number) - STEP) / (1 - STEP)

    def recall(self, question: str, top: int = _CANDIDATES) -> list[Told]:
        """The facts that a question may be about, the best first."""
        check.expect(bool(question.strip()), "question", "some text", "none")
        latent = self.encoder.encode([question]).cpu()
        facts = []
        for recalled in self.memory.recall(latent, top, memory=self.number, where=self._may_be_told)[0]:
            key, value = _key_and_value(recalled.entry)
            parts = excerpts(value)
            covered = coverage(self.encoder, question, [f"{key} {part}" for part in parts] if key else parts)
            best = max(range(len(parts)), key=covered.__getitem__)
            facts.append(Told(recalled, parts[best], covered[best]))
        facts.sort(key=lambda fact: fact.score, reverse=True)
        return self._newest_first(facts)

    def _may_be_told(self, name: Id, entry: Entry) -> bool:
        """A fact without a text has nothing that could be told."""
        return bool(entry.text) and (self.where is None or self.where(name, entry))

    def _newest_first(self, facts: list[Told]) -> list[Told]:
        """Put the newest of those that begin as the best one does before it."""
        if not facts:
            return facts
        order = {name: place for place, name in enumerate(self.memory.ids)}
        same = [fact for fact in facts if begin_alike(fact.passage, facts[0].passage)]
        newest = max(same, key=lambda fact: order[fact.recalled.name], default=facts[0])
        return [newest, *(fact for fact in facts if fact is not newest)]

    def say(self, prompts: Sequence[tuple[str, str]]) -> list[str]:
        """The first sentence that the model says to each prompt.

        Args:
            prompts: how it is to answer, and what the user says.
        """
        roles = ("system", "user")
        rows = [
            chat_ids(
                self.tokenizer,
                [{"role": role, "content": text} for role, text in zip(roles, prompt, strict=True)],
            )
            for prompt in prompts
        ]

        def words(tokens: list[int]) -> str:
            return self.tokenizer.decode(tokens, skip_special_tokens=True)

        written = greedy(self.decoder, rows, self.max_new_tokens, lambda tokens: has_sentence(words(tokens)))
        return [first_sentence(words(tokens)) for tokens in written]


def _answer(question: str, facts: list[Told], prompt: tuple[str, str], said: str) -> Answer:
    """What the model said as an answer: what is left of it, or a quotation."""
    if prompt[0] == ALONE:
        return Answer(said, "model", facts)
    kept = grounded(said, facts[0].passage, question)
    return Answer(facts[0].passage, "quote", facts) if kept is None else Answer(kept, "memory", facts)


def _key_and_value(entry: Entry) -> tuple[str, str]:
    """What a fact answers, if that was written with it, and what it says."""
    known = entry.metadata or {}
    key, value = known.get("key"), known.get("value")
    return (key, value) if isinstance(key, str) and isinstance(value, str) else ("", entry.text or "")


def begin_alike(one: str, other: str) -> bool:
    """Whether two facts have their first words in common, half of the shorter one's and three at least."""
    words = one.lower().split(), other.lower().split()
    common = 0
    for mine, theirs in zip(*words, strict=False):
        if mine != theirs:
            break
        common += 1
    return common >= max(3, min(map(len, words)) / 2)
