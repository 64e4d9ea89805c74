"""Rows of CounterFact and zsRE, in the layouts that are in use, as cases to edit and measure."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..editing.edit import Edit

COUNTERFACT, ZSRE = "counterfact", "zsre"


class Neighbour(NamedTuple):
    """A prompt about something else, and its right answer, which an edit should not change."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Case:
    """One fact to edit, and what to ask about it.

    Attributes:
        name: the row's `case_id`, else its number.
        kind: `"counterfact"` or `"zsre"`.
        edit: the fact.
        truth: what the model should no longer say.
        paraphrases: the same question in other words.
        neighbours: questions about something else.
        generation: prompts about the subject, to be continued; may be empty.
    """

    name: str
    kind: str
    edit: Edit
    truth: str
    paraphrases: tuple[str, ...]
    neighbours: tuple[Neighbour, ...]
    generation: tuple[str, ...] = ()


class Cases(NamedTuple):
    """The cases of a file, and why other rows of it are none."""

    cases: list[Case]
    refused: list[str]


def read_cases(
    path: str | os.PathLike, start: int = 0, rows: int | None = None, skip_bad: bool = False
) -> Cases:
    """Read rows of CounterFact or zsRE from a JSON array, or from JSON lines.

    Three layouts are told apart by their fields: the ROME repository's CounterFact (`requested_rewrite`),
    EasyEdit's (`prompt`, `target_new`, `ground_truth`, `rephrase_prompt`, `locality_prompt`,
    `locality_ground_truth`), and zsRE's as MEND published it (`src`, `alt`, `answers`, `rephrase`, `loc`,
    `loc_ans`). A row in EasyEdit's names whose locality prompt begins with "nq question:" is of zsRE.

    Args:
        path: the file.
        start: the first row, counted from 0.
        rows: how many; None: all that follow.
        skip_bad: leave a bad row out, and say why; False: raise.

    Raises:
        ValueError: the file cannot be read or holds no rows, `start` is beyond them, or a row lacks
            something: the message names the row and what it lacks.

    Example:
        >>> cases, _ = read_cases("counterfact.json", start=100, rows=20)
    """
    found = _read(Path(path))
    if not 0 <= start < len(found):
        raise ValueError(f"start: expected from 0 to {len(found) - 1}, the last row, got {start}")
    if rows is not None and rows < 1:
        raise ValueError(f"rows: expected at least 1, got {rows}")
    result = Cases([], [])
    for number, row in enumerate(found[start : None if rows is None else start + rows], start):
        try:
            result.cases.append(case_of(row, number))
        except (ValueError, TypeError) as error:
            if not skip_bad:
                raise
            result.refused.append(str(error))
    if not result.cases:
        raise ValueError(f"data: expected rows that can be read, got none: {result.refused[0]}")
    return result


def case_of(row: object, number: int) -> Case:
    """One row as a case; see `read_cases`.

    Raises:
        ValueError: the row lacks something, or its prompt does not name the subject once.
    """
    if not isinstance(row, dict):
        raise ValueError(f"data: expected an object in row {number}, got {type(row).__name__}")
    fields, name = _Fields(row, number), str(row.get("case_id", number))
    try:
        return _rome(fields, name) if "requested_rewrite" in row else _named(fields, name)
    except ValueError as error:
        if str(error).startswith("data: "):
            raise
        raise ValueError(f"data: row {number}: {error}") from error


class _Fields:
    """Access to a row by field, under whichever of its names the field has."""

    def __init__(self, row: dict, number: int, path: str = ""):
        self.row, self.number, self.path = row, number, path

    def has(self, *names: str) -> bool:
        return any(self.row.get(name) is not None for name in names)

    def within(self, name: str) -> _Fields:
        inner = self.row.get(name)
        if not isinstance(inner, dict):
            self.refuse((name,), "an object", inner)
        return _Fields(inner, self.number, f"{self.path}{name}.")

    def text(self, *names: str) -> str:
        """A text; of a list of right answers the first."""
        value = self._value(names)
        first = value[0] if isinstance(value, list) and value else value
        if not isinstance(first, str) or not first.strip():
            self.refuse(names, "some text", value)
        return first.strip()

    def texts(self, *names: str) -> tuple[str, ...]:
        """One text or a list of texts, at least one."""
        value = self._value(names)
        found = value if isinstance(value, list) else [value]
        if not found or not all(isinstance(text, str) and text.strip() for text in found):
            self.refuse(names, "some text", value)
        return tuple(text.strip() for text in found)

    def refuse(self, names: Sequence[str], expected: str, value: object) -> None:
        asked = " or ".join(repr(self.path + name) for name in names)
        got = "none" if value is None else repr(value)
        raise ValueError(f"data: expected {expected} under {asked} in row {self.number}, got {got}")

    def _value(self, names: Sequence[str]) -> object:
        return next((self.row[name] for name in names if self.row.get(name) is not None), None)


def _rome(fields: _Fields, name: str) -> Case:
    """ROME's CounterFact: the neighbours share the true answer."""
    rewrite = fields.within("requested_rewrite")
    subject, prompt = rewrite.text("subject"), rewrite.text("prompt")
    target, truth = (rewrite.within(field).text("str") for field in ("target_new", "target_true"))
    return Case(
        name=name,
        kind=COUNTERFACT,
        edit=Edit(subject, prompt, target),
        truth=truth,
        paraphrases=fields.texts("paraphrase_prompts"),
        neighbours=tuple(Neighbour(text, truth) for text in fields.texts("neighborhood_prompts")),
        generation=fields.texts("generation_prompts") if fields.row.get("generation_prompts") else (),
    )


def _named(fields: _Fields, name: str) -> Case:
    """EasyEdit's and MEND's rows: one field for each thing."""
    prompts = fields.texts("loc", "locality_prompt")
    answers = fields.texts("loc_ans", "locality_ground_truth")
    if len(prompts) != len(answers):
        fields.refuse(("loc_ans", "locality_ground_truth"), f"{len(prompts)} answers", list(answers))
    zsre = fields.has("src", "alt", "loc") or prompts[0].startswith("nq question:")
    return Case(
        name=name,
        kind=ZSRE if zsre else COUNTERFACT,
        edit=Edit(fields.text("subject"), fields.text("src", "prompt"), fields.text("alt", "target_new")),
        truth=fields.text("answers", "ground_truth"),
        paraphrases=fields.texts("rephrase", "rephrase_prompt"),
        neighbours=tuple(map(Neighbour, prompts, answers)),
    )


def _read(path: Path) -> list:
    """The rows of a JSON array, or of one JSON object a line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"data: expected a file of rows, got {str(path)!r} ({reason})") from None
    if text.lstrip().startswith("["):
        rows = _parsed(text, f"in {str(path)!r}")
    else:
        # Not splitlines(): a text may hold characters that it takes for line breaks.
        lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        rows = [_parsed(line, f"in line {i} of {str(path)!r}") for i, line in lines]
    if not rows:
        raise ValueError(f"data: expected rows in {str(path)!r}, got none")
    return rows


def _parsed(text: str, where: str):
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"data: expected JSON {where}, got {text[:60]!r} ({error})") from None
