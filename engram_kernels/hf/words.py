"""Which tokens go on with a word, so that a text which stops before one of them stops within it."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from .scripts import goes_on

# By tokenizer: how many tokens it had, and which of them.
_KNOWN: WeakKeyDictionary[object, tuple[int, torch.Tensor]] = WeakKeyDictionary()


def continuing_tokens(tokenizer) -> torch.Tensor:
    """The tokens of a vocabulary that begin with a letter, a mark or a digit, and with no space before it.

    After "Rom" they make another word of it, "Romulus". Parts of a character count too: most of these
    characters are letters. Letters of scripts without spaces begin words of their own, and do not count.

    Returns:
        Their numbers, int64 on the CPU; found once for a tokenizer, and anew when tokens were added to it.

    Example:
        >>> going = continuing_tokens(tokenizer)
        >>> [tokenizer.decode([token]) for token in going[:3].tolist()]
        ['0', '1', '2']
    """
    size, found = _KNOWN.get(tokenizer, (-1, None))
    if found is None or size != len(tokenizer):
        # Behind a letter: by itself, a word of a SentencePiece vocabulary loses its space.
        letter = tokenizer.encode("x", add_special_tokens=False)[-1:]
        before = len(tokenizer.decode(letter))
        # Their numbers may have gaps, and go beyond how many there are.
        tokens = sorted(set(tokenizer.get_vocab().values()))
        texts = tokenizer.batch_decode([[*letter, token] for token in tokens])
        firsts = [(token, text[before : before + 1]) for token, text in zip(tokens, texts, strict=True)]
        going = [token for token, first in firsts if first == "\ufffd" or goes_on(first)]
        found = torch.tensor(going, dtype=torch.int64, device="cpu")
        _KNOWN[tokenizer] = len(tokenizer), found
    return found
