"""Names of a corpus, each by itself: the keys that a write under another name is to leave alone.

What is asked about others begins with their names as a rule, and the keys of a text's first tokens are rare
in statistics of whole texts.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from ..hf.hooks import Stop, capture, run_until
from ..hf.placement import input_device
from ..hf.projection import Projection
from ..hf.tokens import open_ids, pad_rows

# How many names are taken of a corpus, and from how few on none are.
NAMES, FEWEST = 512, 64
ROWS = 64


def names_in(text: str, count: int = NAMES) -> list[str]:
    """Different names of a text, evenly from its beginning to its end: capitalised words within sentences.

    Example:
        >>> names_in("In 1889 the engineer Gustave Eiffel built it in Paris. Many came.")
        ['Gustave Eiffel', 'Paris']
    """
    found: dict[str, None] = {}
    name: list[str] = []
    for before, word in itertools.pairwise([".", *text.split(), "."]):
        plain = word.rstrip(".,;:!?)]”\"'")
        within = before[-1].isalnum() or before[-1] == ","
        if len(plain) > 1 and plain[0].isupper() and (name or within):
            name.append(plain)
            if plain == word:
                continue
        if name:
            found.setdefault(" ".join(name))
            name = []
    names = list(found)
    return [names[i * len(names) // count] for i in range(count)] if len(names) > count else names


@torch.no_grad()
def name_moment(model: nn.Module, tokenizer, projection: Projection, names: list[str]) -> Tensor:
    """`E[kᵀk]` over the projection's inputs at each name's last token, `[in, in]` float64 on its device.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        projection: whose inputs are observed.
        names: at least one.
    """
    rows = sorted((open_ids(tokenizer, name) for name in names), key=len)
    width, device = projection.matrix.shape[1], projection.matrix.device
    moment = torch.zeros(width, width, dtype=torch.float64, device=device)
    for start in range(0, len(rows), ROWS):
        batch = rows[start : start + ROWS]
        ids, mask = pad_rows(batch, input_device(model))
        places = torch.arange(len(batch)), torch.tensor([len(row) - 1 for row in batch])

        def observe(_module, arguments, _keywords, shape=ids.shape, places=places):
            keys = projection.inputs(arguments[0]).reshape(*shape, -1)[places].double()
            moment.addmm_(keys.mT, keys)
            raise Stop

        with capture(before={projection.module: observe}):
            run_until(model, input_ids=ids, attention_mask=mask)
    return moment / len(rows)
