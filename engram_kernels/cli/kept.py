"""What the commands of `engram memory` share: its folder, its encoder, and how facts are shown."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from datetime import datetime, timezone
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import bars, device_of, reading
from .facts import Fact, fact_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..memory import EpisodicMemory, SentenceEncoder

Folder = Annotated[Path, typer.Argument(help="The memory's folder.")]
User = Annotated[str | None, typer.Option(help="Whose memory in the folder; default: the one of no user.")]
# Characters of a fact that a table shows.
SHOWN = 200
# One encoder's latents of a text are as near to each other as this, on whatever device.
_SAME = 0.99


def saved(folder: Path) -> EpisodicMemory:
    from ..memory import EpisodicMemory

    with reading("memory"):
        return EpisodicMemory.from_pretrained(folder)


def filled(folder: Path) -> EpisodicMemory:
    kept = saved(folder)
    if not kept.ids:
        raise ValueError(f"memory: expected one that holds facts, got {str(folder)!r}, which holds none")
    return kept


def encoder_name(kept: EpisodicMemory, folder: Path) -> str:
    if kept.encoder is None:
        raise ValueError(f"memory: expected one that names its encoder, got {str(folder)!r}")
    return kept.encoder


def load(name: str, device: str | None, light: bool = False) -> SentenceEncoder:
    from ..memory import load_encoder

    with reading("encoder"):
        return load_encoder(name, device=device_of(device), light=light)


def known_number(kept: EpisodicMemory, user: str | None) -> int | None:
    return kept.labels.index(user) if user in kept.labels else None


def number_of(kept: EpisodicMemory, user: str | None, add: bool = False) -> int:
    """The number of a user's memory, which is added if need be."""
    number = known_number(kept, user)
    if number is not None:
        return number
    if add:
        return kept.add_memory(user)
    users = ", ".join(repr(label) for label in kept.labels if label is not None) or "no users"
    raise ValueError(f"user: expected one of the memory's ({users}), got {user!r}")


def encoder_of(
    kept: EpisodicMemory, folder: Path, device: str | None, light: bool = False
) -> SentenceEncoder:
    """The encoder that a memory names, if it still makes the latents that its newest fact has."""
    import torch

    name = encoder_name(kept, folder)
    encoder = load(name, device, light)
    written = [entry for _, entry in kept.ledger.items() if (entry.metadata or {}).get("written")]
    for entry in written[-1:]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what can be said of that text was said when it was written
            latents, _ = encoder.encode_passages([fact_of(entry).asked])
        now, then = latents[:1].cpu().float(), entry.key[:1].cpu().float()
        if now.shape != then.shape or float(torch.cosine_similarity(now, then)) < _SAME:
            raise ValueError(
                f"encoder: expected the one that made {str(folder)!r}, got {name!r}, which makes other "
                "latents of the same text now: put the former back, or write the facts to a new memory"
            )
    return encoder


class Encoded:
    """The latents of facts, made before a memory is held, so that nobody waits for the encoder."""

    def __init__(self, encoder: SentenceEncoder, facts: Iterable[Fact]):
        self.encoder = encoder
        self.latents: dict[str, Tensor] = {}
        self.add(facts)

    def add(self, facts: Iterable[Fact]) -> None:
        """Encode what has not been encoded."""
        # Once each: the key of a fact without one is its value, to the bit.
        texts = dict.fromkeys(text for fact in facts for text in (fact.value, fact.asked))
        new = [text for text in texts if text not in self.latents]
        if not new:
            return
        with bars() as progress:
            progress("encode", 0, len(new))
            latents, parts = self.encoder.encode_passages(new)
            progress("encode", len(new), len(new))
        self.latents |= zip(new, latents.cpu().split(parts), strict=True)

    def write(self, memory: EpisodicMemory, number: int, facts: dict[Any, Fact]) -> None:
        """Write facts into a memory, under these ids, now."""
        import torch

        self.add(facts.values())
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        values: list[Tensor] = []
        keys: list[Tensor] = []
        parts: list[int] = []
        for fact in facts.values():
            value, key = self.latents[fact.value], self.latents[fact.asked]
            rows = max(len(value), len(key))
            # A short key is asked for each passage of a long value, and a long key finds a short value.
            values += [torch.stack(list(chain(value, repeat(value[-1], rows - len(value)))))]
            keys += [torch.stack(list(chain(key, repeat(key[-1], rows - len(key)))))]
            parts.append(rows)
        if facts:
            memory.write(
                torch.cat(values),
                keys=torch.cat(keys),
                ids=list(facts),
                texts=[fact.text for fact in facts.values()],
                metadata=[fact.metadata(now) for fact in facts.values()],
                parts=parts,
                memory=number,
            )


def shown(text: str | None, whole: bool) -> str:
    text = text or ""
    return text if whole or len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def counted(count: int) -> str:
    return "1 fact" if count == 1 else f"{count:,} facts"
