"""Long texts in passages, which an encoder reads whole and a question finds by what it is about."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import accumulate

from ..hf.scripts import SENTENCE_ENDS

# A sentence with what follows its end, quotes, brackets and blanks; or a line.
_SENTENCE = re.compile(rf".+?(?:[.!?…]+[\"'”’»)\]]*(?=\s)\s*|[{SENTENCE_ENDS}]+\s*|\n+|\Z)", re.DOTALL)
# A word with the blanks behind it; of scripts without blanks, some characters.
_WORD = re.compile(r"\s*\S{1,40}\s*")

Counts = Callable[[Sequence[str]], Sequence[int]]


def passages(text: str, count: Counts, length: int, overlap: int) -> list[str]:
    """Cut a text into passages of whole sentences that overlap; a sentence that is too long, between words.

    Args:
        text: any text that is not blank.
        count: the number of tokens of each of some texts.
        length: tokens of a passage, at most, unless a single word has more.
        overlap: tokens of a passage that begin the next one too, at most, as far as they are whole sentences.

    Returns:
        The text itself, if it is short enough, else its passages in their order.
    """
    if count([text])[0] <= length:
        return [text]
    units: list[str] = []
    sentences = _SENTENCE.findall(text)
    for sentence, tokens in zip(sentences, count(sentences), strict=True):
        units += [sentence] if tokens <= length else _windows(_WORD.findall(sentence), count, length, 0)
    found = _windows(units, count, length, overlap)
    return [passage.strip() for passage in found if passage.strip()]


def _windows(units: Sequence[str], count: Counts, length: int, overlap: int) -> list[str]:
    """Join units that follow each other to as few texts of at most `length` tokens as there can be."""
    ends = [0, *accumulate(count(units))]
    found, start, end = [], 0, 0
    while end < len(units):
        end = start + 1
        while end < len(units) and ends[end + 1] - ends[start] <= length:
            end += 1
        found.append("".join(units[start:end]))
        # Back by what overlaps, but on by one unit at least, and so far that the next one fits too.
        start, last = end, start
        while (
            last + 1 < start
            and end < len(units)
            and ends[end] - ends[start - 1] <= overlap
            and ends[end + 1] - ends[start - 1] <= length
        ):
            start -= 1
    return found
