"""Edits as token rows, and the batch of rows on which the values of several edits are optimised."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from ...errors import EngramError
from ...hf.tokens import Prompt, Row, check_apart, check_length, encode_row
from ..edit import Edit
from .forms import forms_of
from .names import other_names


@dataclass(frozen=True)
class EncodedEdit:
    """The token rows of one edit.

    Attributes:
        edit: the fact.
        rewriting: the rows of each of its prompts, by itself and then after prefixes, with the target.
        kl_prompt: "{subject} is a", the answer to which shall stay.
        held: rows of earlier facts about the subject, which shall hold.
        texts: how many of `rewriting` belong to each prompt, the first one's first.
        offset: `[out]`, what earlier edits changed the projection's answer to the subject by; None: nothing.
        facts: how many facts about the subject shall hold, this one and earlier ones.
        others: rows of its prompts about other names (`other_rows`), which its write shall spare; a tenth of
            a megabyte, so they are made for the write and not kept.
    """

    edit: Edit
    rewriting: list[Row]
    kl_prompt: Row
    held: list[Row] = field(default_factory=list)
    texts: tuple[int, ...] = ()
    offset: torch.Tensor | None = field(default=None, compare=False)
    facts: int = 1
    others: list[Row] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        """All rows with a target."""
        return [*self.rewriting, *self.held]

    @property
    def bare(self) -> list[Row]:
        """The rows of its prompts by themselves."""
        firsts = itertools.accumulate(self.texts[:-1], initial=0)
        return [self.rewriting[first] for first in firsts]

    @property
    def span(self) -> tuple[int, int]:
        """The longest stretch that is read from the subject's last token on, and the longest before it."""
        rows = [*self.rows, self.kl_prompt]
        return max(len(row.inputs) - row.subject for row in rows), max(row.subject for row in rows)


def encode_edit(
    model,
    tokenizer,
    edit: Edit,
    prefixes: Sequence[str],
    texts: int | None = None,
    forms: bool = False,
) -> EncodedEdit:
    """Tokenise one edit.

    Args:
        model: gives the longest text.
        tokenizer: of the model.
        edit: the fact.
        prefixes: texts to stand before its prompts.
        texts: about how many rows to make; each prompt gets its share of the prefixes, at least one, and no
            two prompts the same ones while there are enough. None: every prompt after every prefix.
        forms: beside them the first prompt in the forms of `forms_of`.

    Raises:
        EngramError: the subject or target has no token, or a text is longer than the model's context.
    """
    prompts = edit.prompts
    turn, share = list(prefixes), len(prefixes)
    if texts is not None:
        turn, share = _in_turn(prefixes), min(share, max(1 if forms else 2, texts // len(prompts) - 1))
    groups = [
        _rows(model, tokenizer, edit, prompt, [turn[(i * share + j) % len(turn)] for j in range(share)])
        for i, prompt in enumerate(prompts)
    ]
    if forms:
        asked = forms_of(tokenizer, edit)
        groups[0] += [row for form in asked for row in _rows(model, tokenizer, edit, form, ())]
    kl_prompt = check_length(model, encode_row(tokenizer, edit.subject, "{} is a"), edit.prompt_text)
    rewriting = [row for group in groups for row in group]
    return EncodedEdit(edit, rewriting, kl_prompt, texts=tuple(map(len, groups)))


def other_rows(model, tokenizer, edit: Edit) -> list[Row]:
    """The rows of an edit's prompts about other names, without a target; the prompts take turns.

    A name is left out that the tokenizer has no token for, or the model no embedding, or no room for.
    """
    rows = []
    for name, prompt in zip(other_names(edit.subject), itertools.cycle(edit.prompts), strict=False):
        with suppress(EngramError):
            rows.append(check_length(model, encode_row(tokenizer, name, prompt), edit.prompt_text))
    return rows


def encode_held(model, tokenizer, facts: Sequence[Edit], prefixes: Sequence[str]) -> list[Row]:
    """The rows of facts that shall hold: their prompts by themselves and after two prefixes.

    Raises:
        EngramError: a text cannot be used.
    """
    chosen = _in_turn(prefixes)[:2]
    return [
        row
        for fact in facts
        for prompt in fact.prompts
        for row in _rows(model, tokenizer, fact, prompt, chosen)
    ]


def _rows(model, tokenizer, edit: Edit, prompt: Prompt, prefixes: Sequence[str]) -> list[Row]:
    """One prompt by itself, and after some prefixes."""
    found = []
    for prefix in ["", *(f"{prefix}. " for prefix in prefixes)]:
        row = encode_row(tokenizer, edit.subject, prompt, edit.target, prefix, edit.space, whole=True)
        check_apart(row, edit.prompt_text, edit.target)
        found.append(check_length(model, row, edit.prompt_text, prefix))
    return found


def _in_turn(prefixes: Sequence[str]) -> list[str]:
    """The prefixes, which are listed by length, so that short and long ones take turns."""
    half = (len(prefixes) + 1) // 2
    pairs = itertools.zip_longest(prefixes[:half], prefixes[half:])
    return [prefix for pair in pairs for prefix in pair if prefix is not None]


class EditBatch:
    """The rows of several edits as one batch, and the places where predictions are read.

    Attributes:
        edits: the encoded edits.
        rows: all rows, edit after edit; the last one of an edit is its KL prompt.
        owner: `[rows]`, the index of each row's edit.
        bare: `[edits]`, the row of each edit's bare prompt.
        inputs: of every row the tokens that are read.
        subjects, lengths: `[rows]`, the position of the subject's last token, and how many tokens are read.
        place_rows, place_positions: `[targets + ends + kept]`, where a token is predicted: first every token
            of every target; where asked for, the one after each target that a word may go on after; then the
            one after each KL prompt and, where asked for, after each target.
        labels: `[targets]`, those tokens.
        shares: `[targets]`, their weights in the mean over an edit's rows of the mean over a target's tokens.
        place_owner: `[targets]`, the index of each target token's edit.
        row_shares: `[targets]`, their weights in the mean over a row's target.
        end_rows, end_owner: `[ends]`, the row and the index of the edit of each target whose word shall end.
        end_shares: `[ends]`, their weights in the mean over an edit's rows.
        going: the tokens that go on with a word, on the CPU; None where no word shall end.
        kept_owner: `[kept]`, the index of each other place's edit.
        kept_shares: `[kept]`, their weights in the divergence from the unedited model.

    Args:
        edits: to search side by side.
        device: of the tensors.
        kl_weight: of what follows a KL prompt.
        after_weight: of what follows a target, in the mean over an edit's rows; 0: it is not read.
        end_weight: of the end of a target's word, in the mean over an edit's rows; 0: it is not read.
    """

    def __init__(
        self,
        edits: Sequence[EncodedEdit],
        device: torch.device,
        kl_weight: float = 1.0,
        after_weight: float = 0.0,
        end_weight: float = 0.0,
    ):
        self.edits, self.weights = list(edits), (kl_weight, after_weight, end_weight)
        self.rows: list[Row] = []
        self.going: torch.Tensor | None = None
        owner, bare, kept = [], [], []
        ends: list[tuple[int, int, int, float]] = []
        targets: list[tuple[int, int, int, float, float, int]] = []
        for number, encoded in enumerate(self.edits):
            bare.append(len(self.rows))
            for at, row in enumerate(encoded.rows, len(self.rows)):
                own = 1.0 / (len(row.ids) - row.target)
                # A token is predicted one position earlier.
                for position in range(row.target, len(row.ids)):
                    share = own / len(encoded.rows)
                    targets.append((at, position - 1, row.ids[position], share, own, number))
                if end_weight and row.going is not None:
                    self.going = row.going
                    ends.append((at, len(row.ids) - 1, number, end_weight / len(encoded.rows)))
                if after_weight:
                    kept.append((at, len(row.ids) - 1, number, after_weight / len(encoded.rows)))
            self.rows += [*encoded.rows, encoded.kl_prompt]
            kept.append((len(self.rows) - 1, len(encoded.kl_prompt.ids) - 1, number, kl_weight))
            owner += [number] * (len(encoded.rows) + 1)
        rows, positions, labels, shares, row_shares, place_owner = zip(*targets, strict=True)
        kept_rows, kept_positions, kept_owner, kept_shares = zip(*kept, strict=True)
        end_rows, end_positions, end_owner, end_shares = zip(*ends, strict=True) if ends else ((),) * 4
        self.inputs = [row.ids if after_weight or ends else row.inputs for row in self.rows]

        def tensor(values, dtype=torch.int64):
            return torch.tensor(values, dtype=dtype, device=device)

        self.owner, self.bare = tensor(owner), tensor(bare)
        self.place_rows = tensor(rows + end_rows + kept_rows)
        self.place_positions = tensor(positions + end_positions + kept_positions)
        self.labels, self.place_owner = tensor(labels), tensor(place_owner)
        self.shares, self.row_shares = tensor(shares, torch.float32), tensor(row_shares, torch.float32)
        self.end_rows, self.end_owner = tensor(end_rows), tensor(end_owner)
        self.end_shares = tensor(end_shares, torch.float32)
        self.kept_owner, self.kept_shares = tensor(kept_owner), tensor(kept_shares, torch.float32)
        self.subjects = tensor([row.subject for row in self.rows])
        self.lengths = tensor(list(map(len, self.inputs)))
