"""The rows of `bench/data/edits_that_take.json`, with the texts that CounterFact's file has for them."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

ROWS = Path(__file__).parent / "data" / "edits_that_take.json"
# How far along the list of relations those are whose prompts ask a subject for something else.
ELSEWHERE = (3, 6, 9, 12)
DIGESTED = ("prompt", "subject", "target_new", "ground_truth", "locality_prompt")


@dataclass(frozen=True)
class TakeRow:
    """One fact and what is asked about it; every text but `neighbours` has `{}` in the subject's place.

    Attributes:
        number: of the row in CounterFact's file.
        relation: what the fact says, such as "mother tongue".
        subject, prompt, target: the edit.
        truth: what the prompt's true answer is.
        given: three other wordings that an edit may be told.
        unseen: wordings that no edit is told; the target continues each.
        given_question, question: in the form "Q: … A:"; the first may be told, the second not.
        given_chat, chat: what a user writes to a chat model; the first may be told, the second not.
        neighbours: twelve prompts about other subjects, of the same relation.
        elsewhere: prompts of four other relations, which the target hardly ever answers.
    """

    number: int
    relation: str
    subject: str
    prompt: str
    target: str
    truth: str
    given: tuple[str, ...]
    unseen: tuple[str, ...]
    given_question: str
    question: str
    given_chat: str
    chat: str
    neighbours: tuple[str, ...]
    elsewhere: tuple[str, ...] = ()

    def about(self, text: str) -> str:
        """A text with the subject in its place."""
        return text.replace("{}", self.subject)


def read_take_rows(path: Path | None = None, data: Path | None = None) -> list[TakeRow]:
    """All rows, the first of every relation, then the second: a beginning of them has all relations.

    CounterFact's file is looked for in `$ENGRAM_DATA`.

    Raises:
        ValueError: a row of CounterFact's file is another one than when the paraphrases were written.
    """
    content = json.loads((path or ROWS).read_text(encoding="utf-8"))
    file = data or Path(os.environ.get("ENGRAM_DATA", "."), content["data"])
    cases = json.loads(Path(file).read_text(encoding="utf-8"))
    rows: list[TakeRow] = []
    places: list[int] = []
    for relation in content["relations"]:
        for place, row in enumerate(relation["rows"]):
            case = cases[row["row"]]
            digest = hashlib.sha256("\n".join(case[name] for name in DIGESTED).encode()).hexdigest()
            if not digest.startswith(row["sha256"]):
                raise ValueError(f"data: expected the row {row['row']} of {row['subject']}, got another text")
            places.append(place)
            rows.append(
                TakeRow(
                    number=row["row"],
                    relation=relation["relation"],
                    subject=row["subject"],
                    prompt=case["prompt"].replace(row["subject"], "{}", 1),
                    target=row["target"],
                    truth=case["ground_truth"],
                    **{name: tuple(relation[name]) for name in ("given", "unseen")},
                    **{n: relation[n] for n in ("given_question", "question", "given_chat", "chat")},
                    neighbours=(
                        case["locality_prompt"],
                        *(cases[number]["prompt"] for number in row["neighbours"]),
                    ),
                )
            )
    prompts = {row.relation: row.prompt for place, row in zip(places, rows, strict=True) if place == 0}
    numbers = {name: number for number, name in enumerate(prompts)}
    listed = list(prompts.values())
    rows = [
        replace(row, elsewhere=tuple(listed[(numbers[row.relation] + by) % len(listed)] for by in ELSEWHERE))
        for row in rows
    ]
    return [row for _, row in sorted(zip(places, rows, strict=True), key=lambda pair: pair[0])]
