"""Where texts meet: whether a space stands between them, and where a subject stands as whole words."""

from __future__ import annotations

import re
import unicodedata

# Scripts whose words follow each other without spaces: their names begin the names of their characters.
UNSPACED = (
    "CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "IDEOGRAPHIC", "FULLWIDTH", "THAI",
    "LAO", "KHMER", "MYANMAR", "TIBETAN", "YI ", "JAVANESE", "BALINESE",
)  # fmt: skip
QUOTES = "\"'`"
# Punctuation after which the next word stands by itself. A slash, an underscore, an @ ties words together.
ENDS = ",;:.!?%…–—&=+*<>|~©®°\u061b\u061f\u060c\u06d4\u0964\u0965"
BEGINS = "¿¡#@&=+*<~§†"
# What ends a sentence where no full stop does: in Chinese, Japanese, Hindi, Arabic, Urdu.
SENTENCE_ENDS = "。！？।॥؟۔"


def is_whole(text: str) -> bool:
    """Whether a text has no half of a character: JSON can spell one, and bytes in no UTF-8 become one."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def joint(prompt: str, target: str, space: bool | None = None) -> str:
    """What stands between a prompt and its target: a space, where both ask for one, or nothing.

    Nothing, where either has brought its space, where a script has none (Chinese, Japanese, Thai), after what
    opens (a bracket, a quotation, a currency sign, a hyphen) and before what closes (a full stop, a bracket).

    Args:
        prompt: what stands before.
        target: what follows.
        space: True and False settle it; None: by the rule.
    """
    if not (prompt and target):
        return ""
    if space is not None:
        return " " if space else ""
    return " " if _ends_word(prompt) and _begins_word(target) else ""


def stands_apart(prompt: str, target: str, space: bool | None = None) -> bool:
    """Whether a target is a word of its own after a prompt, so that other text may stand between them.

    Example:
        >>> stands_apart("The capital is", "Rome"), stands_apart("It costs $", "5")
        (True, False)
    """
    if space is not None:
        return space
    return joint(prompt, target) == " " or (_is_unspaced(prompt[-1]) and _is_unspaced(target[0]))


def whole_words(subject: str, text: str) -> list[int]:
    """Where the subject stands in a text and no word goes on beyond its ends."""
    return [
        found.start()
        for found in re.finditer(re.escape(subject), text)
        if not (_tied(text[: found.start()][-1:], subject[0]) or _tied(subject[-1], text[found.end() :][:1]))
    ]


def _tied(before: str, after: str) -> bool:
    """Whether two characters that stand beside each other are of one word."""
    return is_spaced_word(before) and is_spaced_word(after)


def is_spaced_word(character: str) -> bool:
    """A letter, a mark or a digit of a script that puts spaces between words; an empty text is none."""
    return bool(character) and unicodedata.category(character)[0] in "LMN" and not _is_unspaced(character)


def goes_on(character: str) -> bool:
    """Whether a character makes another word of the one before it.

    Not in Korean, which writes particles and counters beside a noun or a number ("서울은", "1923년").
    """
    return is_spaced_word(character) and not unicodedata.name(character, "").startswith("HANGUL")


def _is_unspaced(character: str) -> bool:
    return unicodedata.name(character, "").startswith(UNSPACED)


def _ends_word(prompt: str) -> bool:
    last = prompt[-1]
    if last.isspace() or _is_unspaced(last):
        return False
    if last in QUOTES:
        # An even one closes, and so does an apostrophe at the end of a word.
        return prompt.count(last) % 2 == 0 or (last == "'" and prompt[-2:-1].isalnum())
    if last in "-‐":
        return prompt[-2:-1].isspace()
    kind = unicodedata.category(last)
    return kind[0] in "LMN" or kind in ("Pe", "Pf", "So") or last in ENDS


def _begins_word(target: str) -> bool:
    first = target[0]
    if first.isspace() or _is_unspaced(first):
        return False
    if first in QUOTES:
        # "'s" goes on; "'tis" is rare.
        return first != "'" or target.count("'") > 1
    if first in "-‐−":
        return target[1:2].isdigit()
    kind = unicodedata.category(first)
    return kind[0] in "LMN" or kind in ("Ps", "Pi", "Sc", "So") or first in BEGINS
