"""The texts that the values of several edits are optimised on, as one batch of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..hf.tokens import Row, check_length, encode_row
from .edit import Edit


@dataclass(frozen=True)
class Texts:
    """The rows of one edit: the prompt bare and after each prefix, with its target; then "{subject} is a"."""

    edit: Edit
    rewriting: list[Row]
    essence: Row

    @property
    def span(self) -> tuple[int, int]:
        """The longest stretch that is read from the subject's last token on, and the longest before it."""
        rows = [*self.rewriting, self.essence]
        return max(len(row.inputs) - row.subject for row in rows), max(row.subject for row in rows)


def encode_texts(model, tokenizer, edit: Edit, prefixes: Sequence[str]) -> Texts:
    """Tokenise the texts of one edit.

    Raises:
        EngramError: the subject or target has no token, or a text is longer than the model's context.
    """
    rewriting = []
    for prefix in ["", *(f"{prefix}. " for prefix in prefixes)]:
        row = encode_row(tokenizer, edit.subject, edit.prompt, edit.target, prefix)
        rewriting.append(check_length(model, row, edit.text, prefix))
    essence = check_length(model, encode_row(tokenizer, edit.subject, "{} is a"), edit.text)
    return Texts(edit, rewriting, essence)


class Layout:
    """Where the rows of several edits lie in a batch, and where their predictions are read.

    Attributes:
        rows: all rows, edit after edit; the last one of an edit is its essence row.
        owner: `[rows]`, the index of each row's edit.
        bare: `[edits]`, the row of each edit's bare prompt.
        place_rows, place_positions: `[targets + edits]`, where a token is predicted: first every token of
            every target, then the one after each essence.
        labels: `[targets]`, those tokens.
        shares: `[targets]`, their weights in the mean over an edit's rows of the mean over a target's tokens.
        place_owner: `[targets]`, the index of each target token's edit.
    """

    def __init__(self, texts: Sequence[Texts], device: torch.device):
        self.texts = list(texts)
        self.rows: list[Row] = []
        owner, bare, essences = [], [], []
        targets: list[tuple[int, int, int, float, int]] = []
        for number, text in enumerate(self.texts):
            bare.append(len(self.rows))
            for row in text.rewriting:
                share = 1.0 / (len(row.ids) - row.target) / len(text.rewriting)
                # A token is predicted one position earlier.
                targets += [
                    (len(self.rows), position - 1, row.ids[position], share, number)
                    for position in range(row.target, len(row.ids))
                ]
                self.rows.append(row)
                owner.append(number)
            essences.append((len(self.rows), len(text.essence.ids) - 1))
            self.rows.append(text.essence)
            owner.append(number)
        rows, positions, labels, shares, place_owner = zip(*targets, strict=True)

        def tensor(values, dtype=torch.int64):
            return torch.tensor(values, dtype=dtype, device=device)

        self.owner, self.bare = tensor(owner), tensor(bare)
        self.place_rows = tensor([*rows, *(row for row, _ in essences)])
        self.place_positions = tensor([*positions, *(position for _, position in essences)])
        self.labels, self.place_owner = tensor(labels), tensor(place_owner)
        self.shares = tensor(shares, torch.float32)
        self.subjects = tensor([row.subject for row in self.rows])
        self.lengths = tensor([len(row.inputs) for row in self.rows])
