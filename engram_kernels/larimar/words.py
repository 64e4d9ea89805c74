"""The words of a text that carry its content."""

from __future__ import annotations

import re
from collections.abc import Iterator

# English words that carry no fact by themselves.
_PLAIN = frozenset(
    """a an the this that these those i me my we us our you your it its he his him himself she her
    herself they their them there here who whom whose which what where when why how much many of
    to in on at by for from with without as into onto about after before during until than and or
    but nor not no yes never is are was were be been being has have had having do does did doing
    can cannot could may might must will would shall should because since so also too only just
    every each all some any most more both other another called named known name own one s t d m
    ll re ve""".split()
)
# 22:47 and 1,200 are one word each.
WORD = re.compile(r"\w+(?:[.,:]\w+)*")


def content_words(text: str) -> Iterator[re.Match[str]]:
    """The words of a text but for such as "the", "is" and "who", with their places."""
    return (word for word in WORD.finditer(text) if word[0].lower() not in _PLAIN)
