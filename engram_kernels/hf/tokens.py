"""Texts as tokens and as batches, and where a subject and a target lie in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .. import _checks as check
from ..errors import EngramError

if TYPE_CHECKING:
    # Of the public signatures: other parts of the package do not import transformers.
    from transformers import PreTrainedTokenizerBase as Tokenizer  # noqa: F401


def check_text(name: str, value: object) -> str:
    """A text without the space around it; `name` is the argument's.

    Raises:
        TypeError: it is not a string.
        ValueError: it is empty.
    """
    check.expect(isinstance(value, str), name, "a string", type(value).__name__, TypeError)
    check.expect(bool(value.strip()), name, "some text", repr(value))
    return value.strip()


def check_prompt(subject: str, prompt: str) -> tuple[str, str]:
    """A subject without the space around it, and a prompt with one `{}` in the subject's place.

    Args:
        subject: what the prompt is about.
        prompt: with one `{}`, or with the subject itself, once.

    Raises:
        TypeError: one of them is not a string.
        ValueError: one of them is empty, the subject holds `{}`, or the prompt does not name it exactly once.
    """
    subject = check_text("subject", subject)
    check_text("prompt", prompt)
    check.expect("{}" not in subject, "subject", "text without {}", repr(subject))
    if "{}" not in prompt:
        once = prompt.count(subject) == 1
        check.expect(once, "prompt", f"{{}} or the subject {subject!r} exactly once", repr(prompt))
        prompt = prompt.replace(subject, "{}")
    check.expect(prompt.count("{}") == 1, "prompt", "{} exactly once", repr(prompt))
    return subject, prompt


def open_ids(tokenizer, text: str) -> list[int]:
    """The tokens of a text that goes on: without the special token that some tokenizers close a text by."""
    if getattr(tokenizer, "is_fast", False):
        encoding = tokenizer(text, return_special_tokens_mask=True)
        ids, special = list(encoding["input_ids"]), encoding["special_tokens_mask"]
        # Of an empty text, what begins it stays.
        while len(ids) > 1 and special[len(ids) - 1]:
            ids.pop()
        return ids
    # A slow one's own word on which tokens it added is not to be relied on.
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    closed = list(tokenizer(text)["input_ids"])
    if not plain:
        return closed[:1]
    leading = next((i for i in range(len(closed)) if closed[i : i + len(plain)] == plain), 0)
    return closed[:leading] + plain


def pad_rows(rows: list[list[int]], device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both `[rows, longest]`, padded on the right.

    Causal attention never looks to the right, and other attention goes by the mask: padding there needs no
    pad token and no position ids.
    """
    longest = max(map(len, rows))
    ids = [row + [0] * (longest - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return tuple(torch.tensor(part, dtype=torch.int64, device=device) for part in (ids, mask))


@dataclass(frozen=True)
class Row:
    """One tokenised text: the positions of the subject's last token and of the target's first."""

    ids: list[int]
    subject: int
    target: int

    @property
    def inputs(self) -> list[int]:
        """What a model reads to predict the target: all tokens but the target's last."""
        return self.ids[:-1] if self.target < len(self.ids) else self.ids


def encode_row(tokenizer, subject: str, prompt: str, target: str = "", prefix: str = "") -> Row:
    """Tokenise `prefix + prompt + " " + target` as one text, and find subject and target in it.

    Fast tokenizers give offsets into the text, which survive every merge, normaliser, special token and
    character that takes several tokens. Slow ones are asked for the tokens of the text's beginnings instead.

    Args:
        tokenizer: of the model, fast or slow.
        subject: replaces the `{}` of the prompt.
        prompt: with one `{}`.
        target: what follows the prompt; empty for none, and then `Row.target` is the number of tokens.
        prefix: text before the prompt, as it is.

    Raises:
        EngramError: the tokenizer gives the subject or the target no token.
    """
    before, after = prompt.split("{}")
    subject_start = len(prefix) + len(before)
    subject_end = subject_start + len(subject)
    head = prefix + before + subject + after
    space = " " if target and not head[-1:].isspace() else ""
    text = head + space + target
    if getattr(tokenizer, "is_fast", False):
        ids, last, first = _positions_by_offsets(tokenizer, text, (subject_start, subject_end), len(head))
    else:
        ids, last, first = _positions_by_beginnings(tokenizer, text, subject_end, len(head))
    if last is None:
        raise EngramError(f"subject: expected at least one token, got {subject!r}")
    if target and first >= len(ids):
        raise EngramError(f"target: expected at least one token, got {target!r}")
    return Row(ids, last, first if target else len(ids))


def context_length(model) -> int | None:
    """The most tokens that the model takes at once, or None where its configuration does not say."""
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def check_length(model, row: Row, text: str, prefix: str = "") -> Row:
    """The row of a prompt's text, which fits into the model's context.

    Raises:
        EngramError: it does not.
    """
    limit = context_length(model)
    if limit is not None and len(row.ids) > limit:
        after = f" after the prefix {prefix!r}" if prefix else ""
        raise EngramError(
            f"prompt: expected at most {limit} tokens with subject and target, the model's context, "
            f"got {len(row.ids)} in {text!r}{after}"
        )
    return row


def _positions_by_offsets(tokenizer, text: str, subject: tuple[int, int], head_end: int):
    # What closes the text would stand between prompt and answer.
    ids = open_ids(tokenizer, text)
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"][: len(ids)]
    inside = [
        i for i, (start, stop) in enumerate(offsets) if start < subject[1] and stop > max(start, subject[0])
    ]
    target = [i for i, (start, stop) in enumerate(offsets) if stop > max(start, head_end)]
    return ids, inside[-1] if inside else None, target[0] if target else len(ids)


def _positions_by_beginnings(tokenizer, text: str, subject_end: int, head_end: int):
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = open_ids(tokenizer, text)
    leading = len(ids) - len(plain)

    def tokens_of_beginning(end: int) -> int:
        """How many tokens of the text lie wholly in `text[:end]`, as far as both tokenisations agree."""
        beginning = tokenizer(text[:end], add_special_tokens=False)["input_ids"]
        agreeing = 0
        while agreeing < min(len(beginning), len(plain)) and beginning[agreeing] == plain[agreeing]:
            agreeing += 1
        return agreeing if agreeing == len(beginning) else agreeing + 1

    last = min(tokens_of_beginning(subject_end), len(plain)) - 1
    first = min(tokens_of_beginning(head_end), len(plain)) if head_end < len(text) else len(plain)
    return ids, leading + last if last >= 0 else None, leading + first
