"""What of a model's sentence was told, and what it made up."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..hf.scripts import SENTENCE_ENDS
from .words import WORD, content_words

# A full stop after one of these ends no sentence, and none after an initial.
_SENTENCE = re.compile(
    rf"(?<!\bDr)(?<!\bMr)(?<!\bMrs)(?<!\bSt)(?<!\b\w)[.!?][\"'”’»)]*(?=\s|$)|[{SENTENCE_ENDS}]"
)
_CLAUSE = re.compile(r"(?<=[,;])\s")
_ENDINGS = ("ing", "ed", "es", "s", "d")


def first_sentence(text: str) -> str:
    """A text up to its first sentence's end, or its first line's."""
    line = text.strip().split("\n")[0].rstrip()
    end = _SENTENCE.search(line)
    return line[: end.end()] if end else line


def has_sentence(text: str) -> bool:
    """Whether a text has come to a sentence's end."""
    return "\n" in text.strip() or _SENTENCE.search(text) is not None


def grounded(text: str, told: str, asked: str) -> str | None:
    """The first sentence of a text, up to the clause in which a word comes that was neither told nor asked.

    Words are compared without case and English endings; words such as "the" and "is" need no telling.

    Args:
        text: what a model said.
        told: what it was told.
        asked: the question.

    Returns:
        The sentence, or its beginning. None where the first clause already says something else, or where all
        of it stands in the question: that answers nothing.

    Example:
        >>> grounded("It is run by Marta, I think.", "Marta runs the bakery.", "Who runs it?")
        'It is run by Marta.'
    """
    question = _stems(WORD.finditer(asked))
    known = question | _stems(WORD.finditer(told))
    kept = []
    for clause in _CLAUSE.split(first_sentence(text)):
        if not _stems(content_words(clause)) <= known:
            break
        kept.append(clause)
    sentence = " ".join(kept).rstrip(",; ")
    if _stems(content_words(sentence)) <= question:
        return None
    return sentence if has_sentence(sentence) else f"{sentence}."


def _stems(words: Iterable[re.Match[str]]) -> set[str]:
    return {_stem(word[0]) for word in words}


def _stem(word: str) -> str:
    word = word.lower().replace(",", "")
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) > len(ending) + 2:
            return word[: -len(ending)].rstrip("e")
    return word.rstrip("e") if len(word) > 3 else word
