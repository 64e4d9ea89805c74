"""What a model writes after a prompt, and whether that is the answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from .. import _checks as check
from ..errors import EngramError
from ..hf.generation import closing_tokens
from ..hf.generation import greedy as continued
from ..hf.tokens import check_known, context_length, open_ids


@dataclass(frozen=True)
class Written:
    """What a model wrote: its first token, and the text up to a special token, such as the end of a turn."""

    first: int
    text: str


def check_room(limit: int | None, prompt: str, ids: Sequence[int], count: int) -> None:
    """Check that a prompt's tokens and those to be written fit into the model's context.

    Raises:
        EngramError: they do not.
    """
    if limit is not None and len(ids) + count > limit:
        raise EngramError(
            f"prompt: expected at most {limit} tokens with the {count} to write, the model's context, "
            f"got {len(ids) + count} in {check.excerpt(prompt)}"
        )


def greedy(
    model, tokenizer, prompts: Sequence[str], tokens: int | Sequence[int], batch_size: int = 32
) -> list[Written]:
    """Continue each prompt by the likeliest tokens, one after the other.

    Args:
        model: a causal language model, in the mode that it is in.
        tokenizer: its tokenizer.
        prompts: the texts; space at an end of one is dropped, line breaks stay.
        tokens: how many to write, at least one; a sequence has a number for each prompt.
        batch_size: texts a batch, of like length.

    Raises:
        EngramError: a text would be longer than the model's context.
    """
    if not prompts:
        return []
    counts = [tokens] * len(prompts) if isinstance(tokens, int) else list(tokens)
    encoded = [open_ids(tokenizer, prompt.rstrip(" ")) for prompt in prompts]
    limit = context_length(model)
    for prompt, ids, count in zip(prompts, encoded, counts, strict=True):
        check_known(model, ids, prompt)
        check_room(limit, prompt, ids, count)
    special = closing_tokens(model) | set(tokenizer.all_special_ids)
    found: list[Written | None] = [None] * len(prompts)
    # Of like length, so that little is padding.
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        rows = continued(model, [encoded[i] for i in batch], max(counts[i] for i in batch))
        for i, row in zip(batch, rows, strict=True):
            new = row[: counts[i]]
            ended = next((place for place, token in enumerate(new) if token in special), len(new))
            found[i] = Written(new[0], tokenizer.decode(new[:ended]))
    return found


@dataclass(frozen=True)
class Success:
    """How a written text answers: each is a yes or no, and each but the last follows from the one before.

    Attributes:
        exact: the text is the answer and nothing else, up to the first line break or end of a sentence.
        begins: the text begins with the answer, as a whole word.
        contains: the answer stands in the text, as a whole word.
        overlap: the share of the answer's words that stand in the text in their order, for long answers
            (the recall of ROUGE-L, Lin 2004).
    """

    exact: bool
    begins: bool
    contains: bool
    overlap: float


def success(text: str, answer: str, aliases: Sequence[str] = ()) -> Success:
    """Compare what was written with an answer, or with the alias that fits best.

    Case does not count, nor do space, quotation marks and markup before the answer.

    Example:
        >>> success(" Rome, the capital", "Rome")
        Success(exact=False, begins=True, contains=True, overlap=1.0)
    """
    text = _plain(text)
    names = [_plain(name) for name in (answer, *aliases) if _plain(name)]
    begun = [found.end() for found in (_whole(name).match(text) for name in names) if found]
    return Success(
        exact=any(_ENDED.match(text, end) for end in begun),
        begins=bool(begun),
        contains=any(_whole(name).search(text) for name in names),
        overlap=max((_common(_words(name), _words(text)) for name in names), default=0.0),
    )


_MARKS = " \t\r\n\"'“”‘’„«»*_`([{)]}:"
_ENDED = re.compile(rf"[{re.escape(_MARKS)}]*([.!?。！？]|\n|$)")


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold().strip().lstrip(_MARKS).rstrip()


def _whole(name: str) -> re.Pattern:
    """The name, not as a part of a longer word; scripts without spaces have no such bound."""
    bounds = ["" if _wide(name[at]) or not name[at].isalnum() else r"\b" for at in (0, -1)]
    return re.compile(bounds[0] + re.escape(name) + bounds[1])


def _wide(character: str) -> bool:
    # Chinese, Japanese and Korean are wide; Thai, Lao, Burmese and Khmer have no spaces either.
    return (
        unicodedata.east_asian_width(character) in "WF"
        or "\u0e00" <= character <= "\u109f"
        or ("\u1780" <= character <= "\u17ff")
    )


def _words(text: str) -> list[str]:
    """Words, and single characters where a script has no spaces."""
    found = []
    for word in re.findall(r"\w+", text):
        found += list(word) if any(map(_wide, word)) else [word]
    return found


def _common(wanted: Sequence[str], given: Sequence[str]) -> float:
    """The length of the longest common subsequence as a share of the first."""
    if not wanted:
        return 0.0
    row = [0] * (len(given) + 1)
    for word in wanted:
        before = 0
        for i, other in enumerate(given, start=1):
            before, row[i] = row[i], before + 1 if word == other else max(row[i], row[i - 1])
    return row[-1] / len(wanted)
