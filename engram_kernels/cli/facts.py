"""Facts as texts: read from a file, compared with what a memory knows, and found again in it."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._io import encoding_of
from ..hf.scripts import is_whole

if TYPE_CHECKING:
    from ..memory import EpisodicMemory
    from ..memory.ledger import Entry, Id

_NAMES = ("key", "value", "id", "tags")


class Fact(NamedTuple):
    """A line of a file of facts.

    Attributes:
        line: its number.
        key: what will be asked; None: the fact itself.
        value: the fact.
        name: its id; None: the next free number.
        tags: what it can be filtered by.
    """

    line: int
    key: str | None
    value: str
    name: str | None = None
    tags: tuple[str, ...] = ()

    @property
    def asked(self) -> str:
        return self.value if self.key is None else self.key

    @property
    def text(self) -> str:
        return self.value if self.key is None else f"{self.key} → {self.value}"

    @property
    def topic(self) -> tuple[str, str]:
        """What it is about: two facts of one topic that say otherwise contradict each other."""
        return ("fact", _plain(self.value)) if self.key is None else ("key", plain_key(self.key))

    @property
    def statement(self) -> tuple[str, str, str]:
        """What it says, however it is spaced: two facts of one statement are one fact."""
        return *self.topic, _plain(self.value)

    def metadata(self, written: str) -> dict[str, Any]:
        """What the ledger keeps beside its text."""
        known = {"written": written, "tags": list(self.tags)}
        return known if self.key is None else {**known, "key": self.key, "value": self.value}


def fact_of(entry: Entry) -> Fact:
    """The fact that an entry was written from, by a command or in Python."""
    known = entry.metadata or {}
    key, value, tags = known.get("key"), known.get("value"), known.get("tags")
    tags = tuple(tag for tag in tags if isinstance(tag, str)) if isinstance(tags, list) else ()
    if isinstance(key, str) and isinstance(value, str):
        return Fact(0, key, value, None, tags)
    return Fact(0, None, entry.text or "", None, tags)


def plain_key(key: str) -> str:
    """A key as it is compared, whatever its case."""
    return _plain(key).casefold()


def read_facts(path: Path) -> list[Fact]:
    """Facts, one a line: plain text, or a JSON object with "value" and perhaps "key", "id" and "tags".

    Raises:
        ValueError: the file cannot be read, is in no Unicode encoding, or has a line that is no fact; the
            sentence names the line.
    """
    facts = [
        _fact(number, line) for number, line in enumerate(_text(path).split("\n"), start=1) if line.strip()
    ]
    if not facts:
        raise ValueError(f"facts: expected lines of text, got none in {str(path)!r}")
    lines: dict[str, int] = {}
    for fact in facts:
        if fact.name is not None and lines.setdefault(fact.name, fact.line) != fact.line:
            raise ValueError(
                f"facts: expected different ids, got {fact.name!r} in line {lines[fact.name]} and in line "
                f"{fact.line}"
            )
    return facts


def find(memory: EpisodicMemory, ids: Sequence[str], texts: Sequence[str], number: int | None) -> list[Id]:
    """The ids of the facts that were asked for, by id or by text, both as `list` prints them.

    Args:
        memory: where they are.
        ids, texts: what names them.
        number: of the memory whose facts may be named; None: of all.
    """
    by_name: dict[str, list[Id]] = {}
    by_text: dict[str, list[Id]] = {}
    for name, entry in memory.ledger.items():
        if number is None or entry.memory == number:
            by_name.setdefault(str(name), []).append(name)
            by_text.setdefault(_plain(entry.text or ""), []).append(name)
    found: list[Id] = []
    for named in ids:
        if named not in by_name:
            raise ValueError(f"id: expected a fact of the memory, as it lists it, got {named!r}")
        if len(by_name[named]) > 1:
            both = " and ".join(map(repr, by_name[named]))
            raise ValueError(f"id: expected one that names a single fact, got {named!r}, which names {both}")
        found += by_name[named]
    for text in texts:
        if _plain(text) not in by_text:
            raise ValueError(f"text: expected a fact of the memory, as it lists it, got {text!r}")
        found += by_text[_plain(text)]
    return list(dict.fromkeys(found))


def content_of(name: str, path: Path) -> tuple[bytes, str]:
    """A file's bytes and the Unicode encoding that they name, or UTF-8; `name` is the argument's."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name}: expected a text file, got {str(path)!r} ({reason})") from None
    return content, encoding_of(content)


def _text(path: Path) -> str:
    """A file's text, in any Unicode encoding that it names, or in UTF-8."""
    content, encoding = content_of("facts", path)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].decode(encoding, errors="replace").count("\n") + 1
        raise ValueError(
            f"facts: expected UTF-8, or UTF-16 or UTF-32 with a byte order mark, got {str(path)!r}, whose "
            f"line {line} is not {encoding.upper()}; save it as UTF-8"
        ) from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for character in dict.fromkeys(text):
        if unicodedata.category(character) == "Cc" and character not in "\t\n":
            line = text[: text.index(character)].count("\n") + 1
            raise ValueError(
                f"facts: expected text in line {line}, got the control character U+{ord(character):04X}; is "
                "it UTF-16 without a byte order mark, or no text?"
            )
    return text


def _fact(number: int, line: str) -> Fact:
    """The fact that a line is, or an error that names the line."""
    line = line.strip()
    if not line.startswith(("{", "[")):
        return Fact(number, None, line)
    try:
        found = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        if line.startswith("["):
            return Fact(number, None, line)
        raise ValueError(f"facts: expected JSON in line {number}, got {line[:60]!r} ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"facts: expected plain text or a JSON object in line {number}, got the list {line[:60]!r}"
        )
    others = [name for name in found if name not in _NAMES]
    if others:
        raise ValueError(f"facts: expected key, value, id and tags in line {number}, got {others[0]!r}")
    for name, expected in (("value", str), ("key", (str, type(None))), ("id", (str, int, type(None)))):
        _check(number, name, found.get(name), expected)
    tags = found.get("tags") or []
    if not isinstance(tags, list):
        raise ValueError(f"facts: expected a list of texts as 'tags' in line {number}, got {tags!r}")
    for tag in tags:
        _check(number, "tags", tag, str)
    name, key = found.get("id"), found.get("key")
    return Fact(
        number,
        None if key is None else key.strip(),
        found["value"].strip(),
        None if name is None else str(name).strip(),
        tuple(tag.strip() for tag in tags),
    )


def _check(number: int, name: str, value: object, expected: type | tuple[type, ...]) -> None:
    blank = isinstance(value, str) and not value.strip()
    if not isinstance(value, expected) or isinstance(value, bool) or blank:
        raise ValueError(f"facts: expected a text as {name!r} in line {number}, got {value!r}")
    if isinstance(value, str) and not is_whole(value):
        raise ValueError(f"facts: expected whole characters as {name!r} in line {number}, got {value[:60]!r}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an entry twice")
    return found


def _plain(text: str) -> str:
    """A text as it is compared: composed characters, single blanks."""
    return " ".join(unicodedata.normalize("NFC", text).split())
