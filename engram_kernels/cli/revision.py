"""What a file of facts changes in a memory: which are new, which are known, which contradict others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from .facts import Fact, fact_of

if TYPE_CHECKING:
    from ..memory import EpisodicMemory
    from ..memory.ledger import Id

Policy = Literal["newest", "keep", "refuse"]


class Contradiction(NamedTuple):
    """Two facts of one key, or of one id, that say otherwise.

    Attributes:
        line: of the newer one.
        newer, older: what they say.
        name: the older one's id; None: it is an earlier line of the file.
    """

    line: int
    newer: str
    older: str
    name: Id | None


@dataclass
class Revision:
    """What is to be done.

    Attributes:
        facts: those to be written, by id.
        replaced: ids of those to be forgotten before.
        known: lines that say what the memory knows.
        repeated: lines that say what another line says.
        contradictions: what the policy has decided.
    """

    facts: dict[str, Fact] = field(default_factory=dict)
    replaced: list[Id] = field(default_factory=list)
    known: list[int] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)
    contradictions: list[Contradiction] = field(default_factory=list)


def revise(
    memory: EpisodicMemory, number: int | None, facts: Sequence[Fact], policy: Policy, skip_known: bool
) -> Revision:
    """Compare facts with those of a memory, and with each other.

    Args:
        memory: stays as it is.
        number: of the memory that they are for; None: one that is not there yet.
        facts: in the order of the file.
        policy: for facts of one key that say otherwise: the newest stays, both are kept, or none is written.
        skip_known: leave out what the memory knows.

    Raises:
        ValueError: a fact that is known, an id that is taken, a contradiction that is refused.
    """
    done = Revision()
    mine = {name: fact_of(entry) for name, entry in memory.ledger.items() if entry.memory == number}
    # What stands, in the memory and in the lines so far, by what it is about.
    standing: dict[tuple[str, str], list[tuple[Id | None, Fact]]] = {}
    for name, fact in mine.items():
        standing.setdefault(fact.topic, []).append((name, fact))
    taken = {str(name): name for name in memory.ids}
    writing: dict[int, Fact] = {}
    heirs: dict[int, str] = {}
    for fact in facts:
        others = standing.setdefault(fact.topic, [])
        same = [name for name, other in others if other.statement == fact.statement]
        if same and same[0] is None:
            done.repeated.append(fact.line)
            continue
        if same:
            if not skip_known:
                raise ValueError(
                    f"facts: expected new ones, got {_short(fact.text)!r} in line {fact.line}, which is "
                    f"known as {str(same[0])!r}; --skip-known leaves out such lines"
                )
            done.known.append(fact.line)
            continue
        older = [*others]
        owner = taken.get(fact.name) if fact.name is not None else None
        if owner is not None and owner not in mine:
            raise ValueError(
                f"facts: expected a new id in line {fact.line}, got {fact.name!r}, which another user's has"
            )
        if owner is not None and owner not in [name for name, _ in older]:
            older.append((owner, mine[owner]))
        for name, other in older:
            if policy == "refuse" or (policy == "keep" and name is not None and name == owner):
                raise _refused(fact, name, other, same_id=name is not None and name == owner)
            done.contradictions.append(Contradiction(fact.line, fact.text, other.text, name))
            if policy == "newest" and name is None:
                del writing[other.line]
            elif policy == "newest" and name not in done.replaced:
                done.replaced.append(name)
                heirs.setdefault(fact.line, str(name))
        if policy == "newest":
            others.clear()
        others.append((None, fact))
        writing[fact.line] = fact
    free = taken.keys() - set(map(str, done.replaced))
    done.facts = _named(list(writing.values()), heirs, free)
    return done


def _refused(fact: Fact, name: Id | None, other: Fact, same_id: bool) -> ValueError:
    place = f"line {other.line}" if name is None else repr(str(name))
    ways = "--on-conflict newest keeps the newer one" + ("" if same_id else ", --on-conflict keep both")
    return ValueError(
        f"facts: expected no contradictions, got {_short(fact.text)!r} in line {fact.line}, where {place} "
        f"says {_short(other.text)!r}; {ways}"
    )


def _named(facts: Sequence[Fact], heirs: dict[int, str], taken: set[str]) -> dict[str, Fact]:
    """An id for each fact: its own, that of the one it replaces, or the next free number."""
    taken = taken | {fact.name for fact in facts if fact.name is not None}
    named: dict[str, Fact] = {}
    number = 0
    for fact in facts:
        name = heirs.get(fact.line) if fact.name is None else fact.name
        while name is None or (fact.name is None and (name in taken or name in named)):
            number += 1
            name = str(number)
        named[name] = fact
    return named


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"
