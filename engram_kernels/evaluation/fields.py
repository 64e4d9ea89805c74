"""Access to a row of a data set by field, with errors that name the field and the row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..hf.scripts import is_whole


class Fields:
    """A row, or an object within it, whose fields are read under whichever of their names they have."""

    def __init__(self, row: dict, number: int, path: str = ""):
        self.row, self.number, self.path = row, number, path

    def __contains__(self, name: str) -> bool:
        return self.row.get(name) is not None

    def within(self, name: str) -> Fields:
        """The object under a name."""
        inner = self.row.get(name)
        if not isinstance(inner, dict):
            self.refuse((name,), "an object", inner)
        return Fields(inner, self.number, f"{self.path}{name}.")

    def objects(self, *names: str) -> Iterator[Fields]:
        """The objects of the list under a name, or the one object there; none where the field is missing."""
        found = self._value(names)
        for i, inner in enumerate(found if isinstance(found, list) else [] if found is None else [found]):
            if not isinstance(inner, dict):
                self.refuse(names, "objects", inner)
            yield Fields(inner, self.number, f"{self.path}{names[0]}[{i}].")

    def text(self, *names: str) -> str:
        """A text or a number; of a list of right answers the first."""
        return self.answers(*names)[0]

    def texts(self, *names: str) -> tuple[str, ...]:
        """A list of texts, or one; empty where the field is missing or an empty list."""
        value = self._value(names)
        found = value if isinstance(value, list) else [] if value is None else [value]
        texts = tuple(text for text in map(_text, found) if text)
        if len(texts) != len(found):
            self.refuse(names, "some text", value)
        if not all(map(is_whole, texts)):
            self.refuse(names, "whole characters", value)
        return texts

    def answers(self, *names: str) -> tuple[str, ...]:
        """The right answers: one, a list, or a list of lists of what each is also called; at least one."""
        value = self._value(names)
        found = tuple(text for text in map(_text, _flat(value)) if text)
        if not found:
            self.refuse(names, "some text", value)
        if not all(map(is_whole, found)):
            self.refuse(names, "whole characters", value)
        return tuple(dict.fromkeys(found))

    def refuse(self, names: Sequence[str], expected: str, value: object) -> None:
        asked = " or ".join(repr(self.path + name) for name in names)
        got = "none" if value is None else repr(value)
        raise ValueError(f"data: expected {expected} under {asked} in row {self.number}, got {got}")

    def _value(self, names: Sequence[str]) -> object:
        return next((self.row[name] for name in names if self.row.get(name) is not None), None)


def _flat(value: object) -> Iterator[object]:
    if isinstance(value, list):
        for inner in value:
            yield from _flat(inner)
    else:
        yield value


def _text(value: object) -> str:
    """A text without the space around it; of a number its digits; else nothing."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value).strip() if number or isinstance(value, str) else ""
