"""Texts as tokens and as batches, and where a subject and a target lie in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .. import _checks as check
from ..errors import EngramError
from .chat import rendered
from .scripts import goes_on, is_whole, joint, whole_words
from .words import continuing_tokens

if TYPE_CHECKING:
    # Of the public signatures: other parts of the package do not import transformers.
    from transformers import PreTrainedTokenizerBase as Tokenizer  # noqa: F401


def check_text(name: str, value: object) -> str:
    """A text without the space around it; `name` is the argument's.

    Raises:
        TypeError: it is not a string.
        ValueError: it is empty, or holds half a character, which no tokenizer takes.
    """
    check.expect(isinstance(value, str), name, "a string", type(value).__name__, TypeError)
    check.expect(bool(value.strip()), name, "some text", repr(value))
    check.expect(is_whole(value), name, "whole characters", repr(value))
    return value.strip()


# Where the subject stands in a chat, while it goes through the template; a private character.
PLACE = "\ue000"
# A text with `{}` in it, or the messages of a chat, as pairs of role and content, one of them with `{}`.
Prompt = str | tuple[tuple[str, str], ...]


def check_prompt(subject: str, prompt: str | Sequence) -> tuple[str, Prompt]:
    """A subject without the space around it, and a prompt with one `{}` in the subject's place.

    Args:
        subject: what the prompt is about.
        prompt: with one `{}`, or with the subject itself, once, as whole words. Or the messages of a chat,
            each with `role` and `content`, of which one is such a text.

    Raises:
        TypeError: one of them is not a string, nor a list of messages.
        ValueError: one of them is empty, the subject holds `{}`, or the prompt does not name it exactly once.
    """
    subject = check_text("subject", subject)
    check.expect("{}" not in subject, "subject", "text without {}", repr(subject))
    if not isinstance(prompt, Sequence) or isinstance(prompt, str):
        return subject, _with_place(subject, prompt)
    messages = tuple(map(_message, prompt))
    check.expect(len(messages) > 0, "prompt", "at least one message", "none")
    contents = [content for _, content in messages]
    about = [i for i, content in enumerate(contents) if "{}" in content]
    about = about or [i for i, content in enumerate(contents) if whole_words(subject, content)]
    check.expect(len(about) == 1, "prompt", f"one message with {{}} or {subject!r}", f"{len(about)} of them")
    (place,) = about
    placed = (messages[place][0], _with_place(subject, contents[place]))
    return subject, (*messages[:place], placed, *messages[place + 1 :])


def prompt_words(prompt: Prompt) -> str:
    """A text, or the last message of a chat."""
    return prompt if isinstance(prompt, str) else prompt[-1][1]


def _with_place(subject: str, prompt: str) -> str:
    """A prompt with one `{}`, which stands in the place of the subject's whole words where there was none."""
    check_text("prompt", prompt)
    if "{}" not in prompt:
        found = whole_words(subject, prompt)
        expected = f"{{}} or the subject {subject!r} exactly once, as whole words"
        check.expect(len(found) == 1, "prompt", expected, repr(prompt))
        prompt = prompt[: found[0]] + "{}" + prompt[found[0] + len(subject) :]
    check.expect(prompt.count("{}") == 1, "prompt", "{} exactly once", repr(prompt))
    return prompt


def _message(message: object) -> tuple[str, str]:
    """One message of a chat as role and content."""
    pair = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else message
    pair = tuple(pair) if isinstance(pair, Sequence) and not isinstance(pair, str) else ()
    whole = len(pair) == 2 and all(isinstance(part, str) for part in pair)
    check.expect(whole, "prompt", "messages with role and content, both texts", repr(message), TypeError)
    return pair


def chat_text(tokenizer, messages: Sequence[tuple[str, str]], target: str = "") -> tuple[str, str]:
    """The text of a chat up to the answer, by the tokenizer's template, and what it puts before the answer.

    Raises:
        EngramError: the tokenizer has no chat template, or one that drops a message.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise EngramError("prompt: expected text for a tokenizer without a chat template, got messages")
    chat = [{"role": role, "content": content} for role, content in messages]
    head = rendered(tokenizer, chat)
    if not all(content.strip() in head for _, content in messages):
        raise EngramError(f"prompt: expected messages that the chat template keeps, got {head!r}")
    if not target:
        return head, ""
    answered = [*chat, {"role": "assistant", "content": target}]
    whole = rendered(tokenizer, answered, ask=False)
    rest = whole[len(head) :] if whole.startswith(head) else ""
    return head, rest[: len(rest) - len(rest.lstrip())]


def open_ids(tokenizer, text: str, special: bool = True) -> list[int]:
    """The tokens of a text that goes on: without the special token that some tokenizers close a text by.

    Args:
        tokenizer: of the model, fast or slow.
        text: to be read.
        special: whether the tokenizer puts its own before the text; a chat's template has done so.
    """
    if not special:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
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
    """One tokenised text: the positions of the subject's last token and of the target's first.

    `going`: the tokens that would go on with the target's last word, where they were asked for and its script
    puts spaces between words; else None. `shorter`: its prompt is a word shorter than the one given.
    """

    ids: list[int]
    subject: int
    target: int
    going: torch.Tensor | None = field(default=None, kw_only=True, repr=False, compare=False)
    shorter: bool = field(default=False, kw_only=True)

    @property
    def inputs(self) -> list[int]:
        """What a model reads to predict the target: all tokens but the target's last."""
        return self.ids[:-1] if self.target < len(self.ids) else self.ids


def encode_row(
    tokenizer,
    subject: str,
    prompt: Prompt,
    target: str = "",
    prefix: str = "",
    space: bool | None = None,
    whole: bool = False,
) -> Row:
    """Tokenise `prefix + prompt + joint + target` as one text, and find subject and target in it.

    The joint is the space that the scripts ask for, or none (`joint`). The target begins with the first token
    that is not the prompt's own: where a token reaches over the end of the prompt, that one.

    Fast tokenizers give offsets into the text, which survive every merge, normaliser, special token and
    character that takes several tokens. Slow ones are asked for the tokens of the text's beginnings instead.

    Args:
        tokenizer: of the model, fast or slow.
        subject: replaces the `{}` of the prompt.
        prompt: with one `{}`, or the messages of a chat, which the target answers.
        target: what follows the prompt; empty for none, and then `Row.target` is the number of tokens.
        prefix: text before the prompt, as it is; in a chat before the words with `{}`.
        space: whether a space stands before the target; None: by the scripts.
        whole: also find the tokens that would go on with the target's last word.

    Raises:
        EngramError: the tokenizer gives the subject or the target no token.
    """
    chat = not isinstance(prompt, str)
    if not isinstance(prompt, str):
        messages = [
            (role, prefix + content.replace("{}", PLACE) if "{}" in content else content)
            for role, content in prompt
        ]
        template, between = chat_text(tokenizer, messages, target)
        between = between if space is None else " " * space
        start, place = template.index(PLACE), PLACE
    else:
        template, between = prefix + prompt, joint(prompt.replace("{}", subject), target, space)
        # The prefix may hold braces of its own.
        start, place = len(prefix) + prompt.index("{}"), "{}"
    end = start + len(subject)
    head = template[:start] + subject + template[start + len(place) :]
    text = head + between + target if target else head
    ids = open_ids(tokenizer, text, not chat)
    last = _last_token(tokenizer, text, ids, (start, end), not chat)
    if last is None:
        raise EngramError(f"subject: expected at least one token, got {subject!r}")
    first = _common(open_ids(tokenizer, head, not chat), ids) if target else len(ids)
    if target and first >= len(ids):
        raise EngramError(f"target: expected at least one token, got {target!r}")
    going = continuing_tokens(tokenizer) if whole and target and goes_on(target[-1]) else None
    return Row(ids, last, first, going=going)


def context_length(model) -> int | None:
    """The most tokens that the model takes at once, or None where its configuration does not say."""
    config = getattr(model, "config", None)
    # Of a model that sees too, its language model's.
    for part in (config, getattr(config, "text_config", None)):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            length = getattr(part, name, None)
            if isinstance(length, int) and length > 0:
                return length
    return None


def check_apart(row: Row, text: str, target: str) -> Row:
    """The row of a text whose target begins behind the subject.

    Raises:
        EngramError: a token reaches from the subject into the target, so that no state is between them.
    """
    if row.target <= row.subject:
        raise EngramError(
            f"target: expected it to begin with a token behind the subject's, got {target!r} after {text!r}, "
            "whose tokens run together"
        )
    return row


def check_known(model, ids: Sequence[int], text: str) -> None:
    """Check that a model has an embedding for every token of a text; a GPU would end the process.

    Raises:
        EngramError: it does not: the tokenizer is another model's, or has more tokens.
    """
    count = model.get_input_embeddings().weight.shape[0]
    highest = max(ids, default=0)
    if highest >= count:
        raise EngramError(
            f"tokenizer: expected the model's, which has embeddings of {count} tokens, got token {highest} "
            f"in {check.excerpt(text)}"
        )


def check_length(model, row: Row, text: str, prefix: str = "", beside: str = "subject and target") -> Row:
    """The row of a prompt's text, which the model has embeddings for and which fits into its context.

    Raises:
        EngramError: it has not, or it does not.
    """
    check_known(model, row.ids, text)
    limit = context_length(model)
    if limit is not None and len(row.ids) > limit:
        after = f" after the prefix {prefix!r}" if prefix else ""
        raise EngramError(
            f"prompt: expected at most {limit} tokens with {beside}, the model's context, "
            f"got {len(row.ids)} in {check.excerpt(text)}{after}"
        )
    return row


def _last_token(tokenizer, text: str, ids: list[int], part: tuple[int, int], special: bool) -> int | None:
    """The last token of what stands in `text[part[0]:part[1]]`; None where it has none."""
    if getattr(tokenizer, "is_fast", False):
        read = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
        inside = [
            i
            for i, (start, stop) in enumerate(read["offset_mapping"][: len(ids)])
            if start < part[1] and stop > max(start, part[0])
        ]
        return inside[-1] if inside else None
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    beginning = tokenizer(text[: part[1]], add_special_tokens=False)["input_ids"]
    # As far as both tokenisations agree; a token may reach over the end of the part.
    agreeing = _common(beginning, plain)
    count = agreeing if agreeing == len(beginning) else agreeing + 1
    last = min(count, len(plain)) - 1
    return len(ids) - len(plain) + last if last >= 0 else None


def _common(first: list[int], second: list[int]) -> int:
    """The length of the longest common beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
