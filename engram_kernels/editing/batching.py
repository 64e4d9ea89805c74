"""Edits as token rows, and the batch of rows on which the values of several edits are optimised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..hf.tokens import Row, check_length, encode_row
from .edit import Edit


@dataclass(frozen=True)
class EncodedEdit:
    """The token rows of one edit.

    Attributes:
        edit: the fact.
        rewriting: the prompt bare and after each prefix, with the target.
        kl_prompt: "{subject} is a", the answer to which shall stay.
    """

    edit: Edit
    rewriting: list[Row]
    kl_prompt: Row

    @property
    def span(self) -> tuple[int, int]:
        """The longest stretch that is read from the subject's last token on, and the longest before it."""
        rows = [*self.rewriting, self.kl_prompt]
        return max(len(row.inputs) - row.subject for row in rows), max(row.subject for row in rows)


def encode_edit(model, tokenizer, edit: Edit, prefixes: Sequence[str]) -> EncodedEdit:
    """Tokenise one edit.

    Raises:
        EngramError: the subject or target has no token, or a text is longer than the model's context.
    """
    rewriting = []
    for prefix in ["", *(f"{prefix}. " for prefix in prefixes)]:
        row = encode_row(tokenizer, edit.subject, edit.prompt, edit.target, prefix)
        rewriting.append(check_length(model, row, edit.text, prefix))
    kl_prompt = check_length(model, encode_row(tokenizer, edit.subject, "{} is a"), edit.text)
    return EncodedEdit(edit, rewriting, kl_prompt)


class EditBatch:
    """The rows of several edits as one batch, and the places where predictions are read.

    Attributes:
        edits: the encoded edits.
        rows: all rows, edit after edit; the last one of an edit is its KL prompt.
        owner: `[rows]`, the index of each row's edit.
        bare: `[edits]`, the row of each edit's bare prompt.
        subjects, lengths: `[rows]`, the position of the subject's last token, and how many tokens are read.
        place_rows, place_positions: `[targets + edits]`, where a token is predicted: first every token of
            every target, then the one after each KL prompt.
        labels: `[targets]`, those tokens.
        shares: `[targets]`, their weights in the mean over an edit's rows of the mean over a target's tokens.
        place_owner: `[targets]`, the index of each target token's edit.
    """

    def __init__(self, edits: Sequence[EncodedEdit], device: torch.device):
        self.edits = list(edits)
        self.rows: list[Row] = []
        owner, bare, kl_places = [], [], []
        targets: list[tuple[int, int, int, float, int]] = []
        for number, encoded in enumerate(self.edits):
            bare.append(len(self.rows))
            for at, row in enumerate(encoded.rewriting, len(self.rows)):
                share = 1.0 / (len(row.ids) - row.target) / len(encoded.rewriting)
                # A token is predicted one position earlier.
                for position in range(row.target, len(row.ids)):
                    targets.append((at, position - 1, row.ids[position], share, number))
            self.rows += [*encoded.rewriting, encoded.kl_prompt]
            kl_places.append((len(self.rows) - 1, len(encoded.kl_prompt.ids) - 1))
            owner += [number] * (len(encoded.rewriting) + 1)
        rows, positions, labels, shares, place_owner = zip(*targets, strict=True)
        kl_rows, kl_positions = zip(*kl_places, strict=True)

        def tensor(values, dtype=torch.int64):
            return torch.tensor(values, dtype=dtype, device=device)

        self.owner, self.bare = tensor(owner), tensor(bare)
        self.place_rows = tensor(rows + kl_rows)
        self.place_positions = tensor(positions + kl_positions)
        self.labels, self.place_owner = tensor(labels), tensor(place_owner)
        self.shares = tensor(shares, torch.float32)
        self.subjects = tensor([row.subject for row in self.rows])
        self.lengths = tensor([len(row.inputs) for row in self.rows])
