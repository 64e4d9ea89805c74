"""The texts that a graft is learned and tested on."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .facts import content_of

if TYPE_CHECKING:
    from ..grafting import PromptTask

Row = tuple[int, str]


@dataclass
class Examples:
    """Rows of (label, text) and the words that answer them; without words, documents."""

    rows: list[Row]
    documents: list[str]
    tests: list[Row]
    template: str | None
    words: list[str]

    @classmethod
    def read(
        cls,
        data: Path,
        test: Path | None,
        template: str | None,
        words: list[str] | None,
        shots: int | None,
        seed: int,
    ) -> Examples:
        """Read the files, and refuse what does not fit together before a model is loaded."""
        if words:
            if template is None or template.count("{}") != 1:
                raise ValueError(f"template: expected one {{}} for the text, got {template!r}")
            if len(set(words)) < 2 or len(set(words)) < len(words):
                raise ValueError(f"word: expected two or more different words, one a label, got {words!r}")
            rows = read_rows("data", data, len(words))
            if shots is not None:
                rows = few(rows, len(words), shots, seed)
            tests = read_rows("test", test, len(words)) if test else []
            return cls(rows, [], tests, template, words)
        for name, value in (("template", template), ("shots", shots), ("test", test)):
            if value is not None:
                raise ValueError(f"{name}: expected a --word for each label with it, got none")
        return cls([], [text for _, text in lines("data", data)], [], None, [])

    def task(self, tokenizer, max_length: int) -> PromptTask | None:
        from ..grafting import PromptTask

        return PromptTask(tokenizer, self.template, self.words, max_length) if self.words else None


def lines(name: str, path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not empty, with their numbers.

    In the Unicode encoding that it names, in UTF-8, or else in Latin-1, which takes any bytes for text.
    """
    content, encoding = content_of(name, path)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(
            f"{name}: expected a text file, got {str(path)!r} with a zero in line {line}; is it UTF-16 "
            "without a byte order mark, or no text?"
        )
    # Not splitlines(): Latin-1 has characters that it takes for line breaks.
    found = [(i, line.strip()) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not found:
        raise ValueError(f"{name}: expected lines of text, got none in {str(path)!r}")
    return found


def read_rows(name: str, path: Path, labels: int) -> list[Row]:
    rows = []
    for number, line in lines(name, path):
        label, _, text = line.replace("\t", " ", 1).partition(" ")
        if not (label.isdecimal() and int(label) < labels and text.strip()):
            raise ValueError(
                f"{name}: expected a label from 0 to {labels - 1} and a text in line {number}, "
                f"got {line[:60]!r}"
            )
        rows.append((int(label), text.strip()))
    return rows


def few(rows: list[Row], labels: int, shots: int, seed: int) -> list[Row]:
    """That many rows of each label, chosen by seed."""
    generator = random.Random(seed)
    chosen = []
    for label in range(labels):
        mine = [row for row in rows if row[0] == label]
        if not 1 <= shots <= len(mine):
            raise ValueError(
                f"shots: expected from 1 to the {len(mine)} rows that label {label} has, got {shots}"
            )
        chosen += generator.sample(mine, shots)
    return chosen


def document_batches(tokenizer, documents: list[str], size: int, max_length: int, seed: int) -> list[dict]:
    """Batches of documents of like length for the loss of a language model, padded on the right."""
    from ..grafting.tasks import by_length, padded

    encoded = [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in documents]
    # One token has nothing to predict.
    encoded = [ids for ids in encoded if len(ids) > 1]
    if not encoded:
        raise ValueError("data: expected a document of two tokens or more, got none")
    batches = [padded(group) for group in by_length(encoded, size, seed, len)]
    for batch in batches:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batches
