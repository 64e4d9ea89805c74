"""One fact to edit, and everything that is asked about it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..editing.edit import Edit


class Query(NamedTuple):
    """A prompt whose answers must all be given, each by one of its names."""

    prompt: str
    answers: tuple[tuple[str, ...], ...]


class RippleTest(NamedTuple):
    """Queries that count as one, and what a model must answer before the edit for them to be asked.

    Attributes:
        queries: the test passes where one of them is answered.
        conditions: all of them are to be answered before the edit.
        every: it passes where all queries are answered instead.
    """

    queries: tuple[Query, ...]
    conditions: tuple[Query, ...] = ()
    every: bool = False


class Question(NamedTuple):
    """A prompt and its right answer.

    Attributes:
        prompt: the text before the answer.
        answer: what should follow.
        group: its kind, as the data set calls it, such as "Subject_Aliasing"; empty where there is one.
        aliases: answers that are as right.
        test: what it belongs to, in a data set that has conditions.
    """

    prompt: str
    answer: str
    group: str = ""
    aliases: tuple[str, ...] = ()
    test: RippleTest | None = None


@dataclass(frozen=True)
class Case:
    """One fact to edit, and what to ask about it.

    Attributes:
        name: the row's `case_id`, else its number.
        kind: the format that it was read from, such as "counterfact".
        edit: the fact.
        truth: what the model should no longer say; None where the data set does not tell.
        paraphrases: the same fact in other words: the edit's target answers each of them.
        neighbours: questions about something else, whose answers an edit should not change.
        generation: prompts about the subject that the target need not answer; may be empty.
        portability: questions whose answers follow from the fact.
        further: more facts of the same case, edited with the first one, as MQuAKE has them.
    """

    name: str
    kind: str
    edit: Edit
    truth: str | None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Question, ...] = ()
    generation: tuple[str, ...] = ()
    portability: tuple[Question, ...] = field(default=())
    further: tuple[Edit, ...] = ()

    @property
    def prompt(self) -> str:
        """What is asked after the edit, to the letter: its prompt with the subject."""
        return self.edit.prompt_text

    @property
    def edits(self) -> tuple[Edit, ...]:
        """All facts of the case."""
        return (self.edit, *self.further)

    @property
    def tests(self) -> tuple[RippleTest, ...]:
        """The tests that its questions belong to."""
        found = (question.test for question in (*self.neighbours, *self.portability))
        return tuple(dict.fromkeys(test for test in found if test is not None))

    def told(self, paraphrases: int = 0, chat: bool = False) -> Case:
        """The case whose edit is told its first paraphrases, which are then not asked, or told as a chat."""
        if not paraphrases and not chat:
            return self
        first, rest = self.paraphrases[:paraphrases], self.paraphrases[paraphrases:]
        edit = replace(self.edit, paraphrases=first, chat=chat)
        further = tuple(replace(each, chat=chat) for each in self.further)
        return replace(self, edit=edit, further=further, paraphrases=rest)
