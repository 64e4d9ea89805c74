"""What a causal trace found: one fact's effects by token and layer, and their average over many facts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from .. import _checks as check
from .._io import read_json, write_json
from ..errors import EngramError
from ..hf.hub import HubFolder

Found = TypeVar("Found", bound="_Found")

FILE = "trace.json"
ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)


class _Found(HubFolder):
    """A result whose fields fit into a JSON file."""

    # The field that is a tensor, and the one that has an entry for each of its rows.
    _table: ClassVar[str]
    _rows: ClassVar[str]

    def to_dict(self) -> dict:
        """Numbers, strings and lists, as JSON takes them; None for NaN."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in content.items():
            if isinstance(value, Tensor):
                content[name] = [[None if x != x else x for x in row] for row in value.tolist()]
            elif isinstance(value, tuple):
                content[name] = list(value)
        return content

    @classmethod
    def from_dict(cls: type[Found], content: Mapping) -> Found:
        """What `to_dict` gave.

        Raises:
            ValueError: a field is missing or unknown, or the effects have not a row for each token or role.
        """
        names = {field.name for field in fields(cls)}
        check.expect(set(content) == names, "content", f"the fields {sorted(names)}", sorted(content))
        table, rows = content[cls._table], len(content[cls._rows])
        lengths = sorted({len(row) for row in table})
        expected, got = f"{rows} rows of one length", f"{len(table)} of the lengths {lengths}"
        check.expect(len(table) == rows and len(lengths) == 1, cls._table, expected, got)
        numbers = [[math.nan if number is None else number for number in row] for row in table]
        lists = {name: tuple(value) for name, value in content.items() if isinstance(value, list)}
        values = torch.tensor(numbers, dtype=torch.float32, device="cpu")
        return cls(**{**content, **lists, cls._table: values})

    def _save_pretrained(self, save_directory: Path) -> None:
        write_json(save_directory / FILE, self.to_dict())

    @classmethod
    def _read_folder(cls: type[Found], folder: Path) -> Found:
        try:
            return cls.from_dict(read_json(folder / FILE))
        except (OSError, TypeError, ValueError) as error:
            raise EngramError(
                f"name_or_directory: expected a saved {cls.__name__}, got {str(folder)!r} ({error})"
            ) from error


@dataclass(frozen=True, eq=False, repr=False)
class Trace(_Found):
    """What restoring one clean state does to an answer, for every token and layer of a prompt.

    Attributes:
        tokens: of the prompt, as text.
        subject: index of the subject's first token, and the one after its last.
        kind: what is restored: `"hidden"`, `"mlp"` or `"attention"`.
        window: over how many layers; 1 for `"hidden"`.
        answer: the token `o` whose probability is measured.
        clean: `p(o)` after the prompt.
        corrupted: its mean over the corrupted copies, nothing restored.
        effects: `[tokens, layers]` float32, the mean `p(o)` with that state restored.
    """

    _table, _rows = "effects", "tokens"

    tokens: tuple[str, ...]
    subject: tuple[int, int]
    kind: str
    window: int
    answer: str
    clean: float
    corrupted: float
    effects: Tensor

    @property
    def indirect_effects(self) -> Tensor:
        """`[tokens, layers]`: by how much restoring that state raises the corrupted probability."""
        return self.effects - self.corrupted

    @property
    def labels(self) -> tuple[str, ...]:
        """The tokens, those of the subject with a star."""
        first, end = self.subject
        return tuple(f"{token}*" if first <= i < end else token for i, token in enumerate(self.tokens))

    def __repr__(self) -> str:
        best = divmod(int(self.effects.argmax()), self.effects.shape[1])
        return (
            f"Trace({self.kind} of {''.join(self.tokens)!r}: p({self.answer}) {self.clean:.4f} clean, "
            f"{self.corrupted:.4f} corrupted, {self.effects[best]:.4f} with token {best[0]}, layer {best[1]})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class AverageTrace(_Found):
    """The average indirect effect over many facts, by what a token is in its prompt.

    Attributes:
        kind: what was restored.
        window: over how many layers.
        facts: how many there were.
        clean: the mean `p(o)` after the prompts.
        corrupted: the same with the subjects corrupted.
        counts: how many tokens there were of each of the six `ROLES`.
        indirect_effects: `[6, layers]` float32, their mean; NaN for a role that no token has.
    """

    _table, _rows = "indirect_effects", "counts"

    kind: str
    window: int
    facts: int
    clean: float
    corrupted: float
    counts: tuple[int, ...]
    indirect_effects: Tensor

    @property
    def labels(self) -> tuple[str, ...]:
        """The roles."""
        return ROLES

    def __repr__(self) -> str:
        return (
            f"AverageTrace({self.kind}, facts={self.facts}, clean={self.clean:.4f}, "
            f"corrupted={self.corrupted:.4f})"
        )


def average(traces: Iterable[Trace]) -> AverageTrace:
    """The average indirect effect by role of the token and layer (the paper's figure 2).

    Every token counts alike. A token may have two roles, as in the paper: the only token of a subject is its
    first and its last, and the only one after a subject is the first subsequent and the last.

    Args:
        traces: of facts that the model knows (`known`), all of one kind, window and depth.

    Returns:
        The effects, averaged over the facts; `draw` and `best_layer` take it.

    Raises:
        ValueError: there is none, or they differ in kind, window or depth.
    """
    traces = list(traces)
    check.expect(len(traces) > 0, "traces", "at least one", "none")
    shapes = {(found.kind, found.window, found.effects.shape[1]) for found in traces}
    check.expect(len(shapes) == 1, "traces", "one kind, window and number of layers", sorted(shapes))
    rows: dict[str, list[Tensor]] = {role: [] for role in ROLES}
    for found in traces:
        effects, (first, end) = found.indirect_effects, found.subject
        parts = (
            effects[first : first + 1],
            effects[first + 1 : end - 1],
            effects[end - 1 : end],
            effects[end : end + 1],
            effects[end + 1 : -1],
            effects[-1:],
        )
        for role, part in zip(ROLES, parts, strict=True):
            rows[role].append(part)
    together = [torch.cat(parts) for parts in rows.values()]
    return AverageTrace(
        kind=traces[0].kind,
        window=traces[0].window,
        facts=len(traces),
        clean=sum(found.clean for found in traces) / len(traces),
        corrupted=sum(found.corrupted for found in traces) / len(traces),
        counts=tuple(map(len, together)),
        indirect_effects=torch.stack([part.mean(0) for part in together]),
    )


def best_layer(average: AverageTrace) -> int:
    """The layer whose MLPs, restored at the last subject token, bring back most: where ROME writes.

    Args:
        average: of traces of the kind `"mlp"`.

    Returns:
        The index of the layer, counted from 0.

    Raises:
        ValueError: the average is not one of MLPs.
    """
    check.expect(average.kind == "mlp", "average", "one of kind 'mlp'", repr(average.kind))
    return int(average.indirect_effects[ROLES.index("last subject token")].argmax())
