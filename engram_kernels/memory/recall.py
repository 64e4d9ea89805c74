"""Which facts a query is about, and whether it is about any: cosines to the keys that were written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .. import _checks as check
from .ledger import Entry, Id, Ledger
from .rows import number_of, rows_of

# What a question about something else scores in a memory of few facts, and how many keys' word that is worth.
PRIOR, PRIOR_KEYS = 0.24, 8
# How far from there to 1 the threshold lies.
STEP = 0.25
# Cosines this near are equal. Two keys of cosine 1 are the same key: of two facts that say otherwise about
# it, neither tells what is not there.
ROUNDING = 1e-6
SAME = 1 - ROUNDING
# Rows of a matrix of cosines that are computed at a time.
_BLOCK = 1024


class Recalled(NamedTuple):
    """A fact that a query may be about.

    Attributes:
        name: its id.
        entry: what the ledger has of it.
        score: the cosine of the query to the nearest of its keys.
        known: whether that is at or above the memory's threshold.
    """

    name: Id
    entry: Entry
    score: float
    known: bool


class MemoryRecall:
    """`recall` and `threshold` of `EpisodicMemory`."""

    ledger: Ledger
    batch: int
    latent: int
    number: Callable[[int | str | None], int | None]
    _once: Callable[[str, Callable[[], float]], float]
    _plain: Callable[[], torch.autocast]

    @torch.no_grad()
    def recall(
        self,
        queries: Tensor,
        top: int = 5,
        *,
        memory: int | str | None = None,
        where: Callable[[Id, Entry], bool] | None = None,
    ) -> list[list[Recalled]]:
        """Rank the facts of the ledger by the cosine of each query to the nearest of their keys.

        Args:
            queries: [N, C], any floating dtype.
            top: how many facts, the nearest first; of equally near ones first the one that was written last.
            memory: the number or the label of the memory whose facts are ranked.
            where: which facts are ranked; default: all.

        Returns:
            For each query its facts; they are `known` from the `threshold` on.

        Raises:
            ValueError, TypeError: as for `read`, or a `top` under 1.

        Example:
            >>> [best, *others] = memory.recall(encoder.encode(["Where is the Eiffel Tower?"]))[0]
            >>> best.entry.text, best.score, best.known
        """
        check.integer("top", top, at_least=1)
        number = number_of(self.number(memory), self.batch)
        check.dimensions("queries", queries, "[N, C]")
        queries = rows_of(queries, None, self.batch, self.latent, number, None, "queries").values
        threshold = self.threshold(memory=number)
        # The newest first, so that it stays first among equals.
        facts = [
            (name, entry)
            for name, entry in reversed(list(self.ledger.items()))
            if entry.memory == number and (where is None or where(name, entry))
        ]
        if not facts:
            return [[] for _ in queries]
        keys, owners = _keys([entry for _, entry in facts])
        ranked = []
        for block in queries.split(_BLOCK):
            with self._plain():
                cosines = normalize(block.to(keys), dim=-1) @ keys.mT
            scores = cosines.new_full((len(block), len(facts)), -1.0)
            scores.scatter_reduce_(1, owners.expand_as(cosines), cosines, "amax")
            # Equal keys get equal scores but for the product's rounding.
            order = (scores / ROUNDING).round().argsort(dim=-1, descending=True, stable=True)[:, :top]
            for row, best in zip(scores, order.tolist(), strict=True):
                found = [(*facts[i], float(row[i])) for i in best]
                ranked.append(
                    [Recalled(name, entry, score, score >= threshold) for name, entry, score in found]
                )
        return ranked

    @torch.no_grad()
    def threshold(self, *, memory: int | str | None = None) -> float:
        """The cosine from which on a query counts as one about a fact that is there.

            l = mean over keys of the cosine to the nearest key of another fact
            t = l + (1 − l) / 4

        Leave-one-out: what a fact scores that is not in the memory says where "not there" lies, and a quarter
        of the way from there to 1 the memory is taken to know. Where there are few keys, l leans to 0.24, as
        if eight more keys had that. Both numbers were chosen on MiniLM latents: see docs/memory.md.

        Args:
            memory: the number or the label of the memory.
        """
        number = number_of(self.number(memory), self.batch)
        return self._once(f"threshold {number}", lambda: self._threshold(number))

    def _threshold(self, number: int) -> float:
        entries = [entry for _, entry in self.ledger.items() if entry.memory == number]
        others = _nearest_others(*_keys(entries)) if len(entries) > 1 else torch.zeros(0, device="cpu")
        absent = (float(others.sum()) + PRIOR_KEYS * PRIOR) / (len(others) + PRIOR_KEYS)
        return absent + STEP * (1 - absent)


def _keys(entries: Sequence[Entry]) -> tuple[Tensor, Tensor]:
    """All keys of facts, of length 1, [R, C] in fp32, and the number of the fact of each, [R]."""
    keys = torch.cat([entry.key for entry in entries]).float()
    counts = torch.tensor([len(entry.key) for entry in entries], device="cpu")
    owners = torch.arange(len(entries), device="cpu").repeat_interleave(counts)
    return normalize(keys, dim=-1), owners.to(keys.device)


def _nearest_others(keys: Tensor, owners: Tensor) -> Tensor:
    """The cosine of each key to the nearest one of another fact, without those that have no other, [≤ R]."""
    found = []
    for block, mine in zip(keys.split(_BLOCK), owners.split(_BLOCK), strict=True):
        cosines = block @ keys.mT
        cosines.masked_fill_((owners == mine[:, None]) | (cosines > SAME), -1.0)
        found.append(cosines.amax(-1))
    nearest = torch.cat(found)
    return nearest[nearest > -1]
