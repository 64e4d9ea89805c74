"""Facts as texts: read from a file, and found again in a memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .examples import lines

if TYPE_CHECKING:
    from ..memory import EpisodicMemory
    from ..memory.ledger import Id


class Fact(NamedTuple):
    """A line of a file of facts.

    Attributes:
        line: its number.
        key: what will be asked; None: the fact itself.
        value: the fact.
        name: its id; None: the next free number.
    """

    line: int
    key: str | None
    value: str
    name: str | None

    @property
    def asked(self) -> str:
        return self.value if self.key is None else self.key

    @property
    def text(self) -> str:
        return self.value if self.key is None else f"{self.key} → {self.value}"


def read_facts(path: Path) -> list[Fact]:
    """Facts, one a line: plain text, or a JSON object with "value" and perhaps "key" and "id"."""
    facts = []
    for number, line in lines("facts", path):
        if not line.startswith("{"):
            facts.append(Fact(number, None, line, None))
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"facts: expected JSON in line {number}, got {line[:60]!r} ({error})") from None
        others = [name for name in found if name not in ("key", "value", "id")]
        if others:
            raise ValueError(f"facts: expected key, value and id in line {number}, got {others[0]!r}")
        for name, expected in (("value", str), ("key", (str, type(None))), ("id", (str, int, type(None)))):
            value = found.get(name)
            blank = isinstance(value, str) and not value.strip()
            if not isinstance(value, expected) or isinstance(value, bool) or blank:
                raise ValueError(f"facts: expected a text as {name!r} in line {number}, got {value!r}")
            # JSON can spell half of a character, which no file and no tokenizer takes.
            if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
                raise ValueError(
                    f"facts: expected whole characters as {name!r} in line {number}, got {value[:60]!r}"
                )
        name = found.get("id")
        facts.append(Fact(number, found.get("key"), found["value"], None if name is None else str(name)))
    return facts


def names_of(facts: Sequence[Fact], memory: EpisodicMemory) -> list[str]:
    """An id for each new fact: its own, or else the next free number. Refuses a fact that is known."""
    known = {entry.text: name for name, entry in memory.ledger.items()}
    taken = {fact.name for fact in facts} | set(map(str, memory.ids))
    names, number = [], 0
    for fact in facts:
        if fact.text in known:
            raise ValueError(
                f"facts: expected new ones, got {fact.text[:60]!r} in line {fact.line}, which is known as "
                f"{known[fact.text]!r}"
            )
        name = fact.name
        while name is None:
            number += 1
            name = None if str(number) in taken else str(number)
        known[fact.text] = name
        names.append(name)
    return names


def find(memory: EpisodicMemory, ids: Sequence[str], texts: Sequence[str]) -> list[Id]:
    """The ids of the facts that were asked for, by id or by text, both as `list` prints them."""
    by_name: dict[str, list[Id]] = {}
    by_text: dict[str | None, list[Id]] = {}
    for name, entry in memory.ledger.items():
        by_name.setdefault(str(name), []).append(name)
        by_text.setdefault(entry.text, []).append(name)
    found: list[Id] = []
    for named in ids:
        # An unknown one goes on as it is: the memory refuses it.
        same = by_name.get(named, [named])
        if len(same) > 1:
            both = " and ".join(map(repr, same))
            raise ValueError(f"id: expected one that names a single fact, got {named!r}, which names {both}")
        found += same
    for text in texts:
        if text not in by_text:
            raise ValueError(f"text: expected a fact of the memory, as it lists it, got {text!r}")
        found += by_text[text]
    return list(dict.fromkeys(found))
