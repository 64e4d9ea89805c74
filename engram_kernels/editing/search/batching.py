"""Edits as token rows, and the batch of rows on which the values of several edits are optimised."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch

from ...errors import EngramError
from ...hf.tokens import Prompt, Row, check_apart, check_length, encode_row
from ..edit import Edit
from .forms import forms_of, shortened
from .names import other_names

# Of an edit whose prompts are long: in about all of its texts, of which fourteen short ones have some
# hundreds, and before other names, which are read up to the written layer alone.
TOKENS, NAMES_TOKENS = 4096, 16384


@dataclass(frozen=True)
class EncodedEdit:
    """The token rows of one edit.

    Attributes:
        edit: the fact.
        rewriting: the rows of each of its prompts, by itself and then after prefixes, with the target.
        kl_prompt: "{subject} is a", the answer to which shall stay.
        held: rows of earlier facts about the subject, which shall hold.
        texts: how many of `rewriting` belong to each prompt, the first one's first.
        offset: `[out]`, what earlier edits changed for the subject, of all layers together; None: nothing.
        norm: `‖v₀‖` of the first of them, before any change; None: of this one, as there is none.
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
    norm: float | None = None
    facts: int = 1
    others: list[Row] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        """All rows with a target."""
        return [*self.rewriting, *self.held]

    @property
    def size(self) -> int:
        """How many rows a batch has of it: those with a target, and at last its KL prompt."""
        return len(self.rewriting) + len(self.held) + 1

    @property
    def bare(self) -> list[Row]:
        """The rows of its prompts by themselves."""
        return [self.rewriting[first] for first in self.firsts]

    @property
    def firsts(self) -> list[int]:
        """Which of all rows these are."""
        return list(itertools.accumulate(self.texts[:-1], initial=0))

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
    shorten: bool = False,
) -> EncodedEdit:
    """Tokenise one edit.

    Args:
        model: gives the longest text.
        tokenizer: of the model.
        edit: the fact.
        prefixes: texts to stand before its prompts.
        texts: about how many rows to make, fewer where they come to more than `TOKENS` tokens; each prompt
            gets its share of the prefixes, at least one, and no two prompts the same ones while there are
            enough. None: every prompt after every prefix.
        forms: beside them the first prompt in the forms of `forms_of`.
        shorten: after every second prefix a prompt stands a word shorter.

    Raises:
        EngramError: the subject or target has no token, or a text is longer than the model's context.
    """
    prompts = edit.prompts
    turn, share = list(prefixes), len(prefixes)
    groups = [_rows(model, tokenizer, edit, prompt, [""]) for prompt in prompts]
    if texts is not None:
        # Every step reads all of them, and a few words before a long prompt add little to it.
        texts = min(texts, TOKENS // max(len(row.ids) for (row,) in groups))
        turn, share = _in_turn(prefixes), min(share, max(1 if forms else 2, texts // len(prompts) - 1))
    for i, (group, prompt) in enumerate(zip(groups, prompts, strict=True)):
        chosen = [turn[(i * share + j) % len(turn)] for j in range(share)]
        shorter = itertools.cycle(shortened(edit, prompt) if shorten else ())
        for number, prefix in enumerate(chosen):
            less = None if number % 2 else next(shorter, None)
            (row,) = _rows(model, tokenizer, edit, less or prompt, [f"{prefix}. "])
            group.append(replace(row, shorter=True) if less else row)
    if forms:
        asked = forms_of(tokenizer, edit)
        groups[0] += [row for form in asked for row in _rows(model, tokenizer, edit, form, [""])]
    kl_prompt = check_length(model, encode_row(tokenizer, edit.subject, "{} is a"), edit.prompt_text)
    rewriting = [row for group in groups for row in group]
    return EncodedEdit(edit, rewriting, kl_prompt, texts=tuple(map(len, groups)))


def other_rows(model, tokenizer, edit: Edit) -> list[Row]:
    """The rows of an edit's prompts about other names, without a target; the prompts take turns.

    A name is left out that the tokenizer has no token for, or the model no embedding, or no room for. Where
    much stands before the subject, so are names at even distances, as every kind shall be there.
    """
    rows, names = [], other_names(edit.subject)
    before = max(encode_row(tokenizer, edit.subject, prompt).subject for prompt in edit.prompts)
    names = names[:: math.ceil(len(names) * before / NAMES_TOKENS) or 1]
    for name, prompt in zip(names, itertools.cycle(edit.prompts), strict=False):
        with suppress(EngramError):
            rows.append(check_length(model, encode_row(tokenizer, name, prompt), edit.prompt_text))
    return rows


def encode_held(model, tokenizer, facts: Sequence[Edit], prefixes: Sequence[str]) -> list[Row]:
    """The rows of facts that shall hold: their prompts by themselves and after two prefixes.

    Raises:
        EngramError: a text cannot be used.
    """
    chosen = ["", *(f"{prefix}. " for prefix in _in_turn(prefixes)[:2])]
    return [
        row
        for fact in facts
        for prompt in fact.prompts
        for row in _rows(model, tokenizer, fact, prompt, chosen)
    ]


def _rows(model, tokenizer, edit: Edit, prompt: Prompt, prefixes: Sequence[str]) -> list[Row]:
    """One prompt after each of some prefixes, an empty one of which leaves it by itself."""
    found, whole = [], not edit.suffixes
    for prefix in prefixes:
        row = encode_row(tokenizer, edit.subject, prompt, edit.target, prefix, edit.space, whole)
        check_apart(row, edit.prompt_text, edit.target)
        found.append(check_length(model, row, edit.prompt_text, prefix))
    return found


def _in_turn(prefixes: Sequence[str]) -> list[str]:
    """The prefixes, which are listed by length, so that short and long ones take turns."""
    half = (len(prefixes) + 1) // 2
    pairs = itertools.zip_longest(prefixes[:half], prefixes[half:])
    return [prefix for pair in pairs for prefix in pair if prefix is not None]


class EditBatch:
    """Rows of several edits as one batch, and the places where predictions are read.

    Attributes:
        edits: the encoded edits.
        rows: the rows, edit after edit; of all of them the last one of an edit is its KL prompt.
        owner: `[rows]`, the index of each row's edit.
        bare: `[edits]`, of all rows that of each edit's bare prompt.
        inputs: of every row the tokens that are read.
        shorter: `[rows]`, whether a row's prompt is a word shorter than the one given.
        subjects, lengths: `[rows]`, the position of the subject's last token, and how many tokens are read.
        place_rows, place_positions: `[places]`, where a token is predicted, each place once.
        places: `[targets + ends + kept]`, which of them is read for every token of every target; where asked
            for, for the one after each target that a word may go on after; then, where asked for, for the one
            after each target, and for the one after each KL prompt.
        labels: `[targets]`, those tokens.
        target_rows: `[targets]`, the row of each.
        shares: `[targets]`, their weights in the mean over an edit's rows of the mean over a target's tokens.
        row_shares: `[targets]`, their weights in the mean over a row's target.
        end_rows: `[ends]`, the row of each target whose word shall end.
        end_shares: `[ends]`, their weights in the mean over an edit's rows.
        going: the tokens that go on with a word, on the CPU; None where no word shall end.
        kept_rows: `[kept]`, the row of each other place.
        kept_shares: `[kept]`, their weights in the divergence from the unedited model.
        kept_ends: `[kept]`, whether the word before shall end there.

    Args:
        edits: to search side by side.
        device: of the tensors.
        kl_weight: of what follows a KL prompt.
        after_weight: of what follows a target, in the mean over an edit's rows; 0: it is not read.
        end_weight: of the end of a target's word, in the mean over an edit's rows; 0: it is not read.
        chosen: the numbers of the rows to take, of all; None: every one.
    """

    def __init__(
        self,
        edits: Sequence[EncodedEdit],
        device: torch.device,
        kl_weight: float = 1.0,
        after_weight: float = 0.0,
        end_weight: float = 0.0,
        chosen: Sequence[int] | None = None,
    ):
        self.edits, self.weights = list(edits), (kl_weight, after_weight, end_weight)
        self.going: torch.Tensor | None = None
        bare: list[int] = []
        listed: list[tuple[int, Row]] = []
        for number, encoded in enumerate(self.edits):
            bare.append(len(listed))
            listed += [(number, row) for row in (*encoded.rows, encoded.kl_prompt)]
        if chosen is not None:
            listed = [listed[i] for i in chosen]
        self.rows = [row for _, row in listed]
        ends: list[tuple[int, int, float]] = []
        kept: list[tuple[int, int, float, bool]] = []
        targets: list[tuple[int, int, int, float, float]] = []
        for at, (number, row) in enumerate(listed):
            encoded, last = self.edits[number], len(row.ids) - 1
            if row is encoded.kl_prompt:
                kept.append((at, last, kl_weight, False))
                continue
            own, texts = 1.0 / (len(row.ids) - row.target), encoded.size - 1
            # A token is predicted one position earlier.
            targets += [(at, i - 1, row.ids[i], own / texts, own) for i in range(row.target, len(row.ids))]
            ended = bool(end_weight) and row.going is not None
            if ended:
                self.going = row.going
                ends.append((at, last, end_weight / texts))
            if after_weight:
                kept.append((at, last, after_weight / texts, ended))
        rows, positions, labels, shares, row_shares = zip(*targets, strict=True) if targets else ((),) * 5
        end_rows, end_positions, end_shares = zip(*ends, strict=True) if ends else ((),) * 3
        kept_rows, kept_positions, kept_shares, kept_ends = zip(*kept, strict=True) if kept else ((),) * 4
        self.inputs = [row.ids if after_weight or ends else row.inputs for row in self.rows]

        def tensor(values, dtype=torch.int64):
            return torch.tensor(values, dtype=dtype, device=device)

        self.owner, self.bare = tensor([number for number, _ in listed]), tensor(bare)
        read = list(zip(rows + end_rows + kept_rows, positions + end_positions + kept_positions, strict=True))
        known = {place: number for number, place in enumerate(dict.fromkeys(read))}
        self.places = tensor([known[place] for place in read])
        self.place_rows, self.place_positions = tensor(list(known)).unbind(1)
        self.labels, self.target_rows = tensor(labels), tensor(rows)
        self.shares, self.row_shares = tensor(shares, torch.float32), tensor(row_shares, torch.float32)
        self.end_rows, self.end_shares = tensor(end_rows), tensor(end_shares, torch.float32)
        self.kept_rows, self.kept_shares = tensor(kept_rows), tensor(kept_shares, torch.float32)
        self.kept_ends = tensor(kept_ends, torch.bool)
        self.shorter = tensor([row.shorter for row in self.rows], torch.bool)
        self.subjects = tensor([row.subject for row in self.rows])
        self.lengths = tensor(list(map(len, self.inputs)))
