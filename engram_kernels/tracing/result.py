"""What a causal trace found: one fact's effects by token and layer, and their average over many facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .. import _checks as check

ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)


@dataclass(frozen=True, eq=False)
class Trace:
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

    def to_dict(self) -> dict:
        """Numbers, strings and lists, as JSON takes them."""
        return _to_dict(self)

    @classmethod
    def from_dict(cls, content: Mapping) -> Trace:
        """The trace that `to_dict` gave.

        Raises:
            ValueError: a field is missing or unknown, or `effects` has not a row for each token.
        """
        return cls(**_from_dict(cls, content, "effects", "tokens"))


@dataclass(frozen=True, eq=False)
class AverageTrace:
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

    def to_dict(self) -> dict:
        """Numbers, strings and lists, as JSON takes them; None for NaN."""
        return _to_dict(self)

    @classmethod
    def from_dict(cls, content: Mapping) -> AverageTrace:
        """The average that `to_dict` gave.

        Raises:
            ValueError: a field is missing or unknown, or `indirect_effects` has not a row for each role.
        """
        return cls(**_from_dict(cls, content, "indirect_effects", "counts"))


def average(traces: Iterable[Trace]) -> AverageTrace:
    """The average indirect effect by role of the token and layer (the paper's figure 2).

    Every token counts alike. A token may have two roles, as in the paper: the only token of a subject is its
    first and its last, and the only one after a subject is the first subsequent and the last.

    Args:
        traces: of facts that the model knows (`known`), all of one kind, window and depth.

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

    Raises:
        ValueError: the average is not one of MLPs.
    """
    check.expect(average.kind == "mlp", "average", "one of kind 'mlp'", repr(average.kind))
    return int(average.indirect_effects[ROLES.index("last subject token")].argmax())


def _to_dict(found: Trace | AverageTrace) -> dict:
    content = {field.name: getattr(found, field.name) for field in fields(found)}
    for name, value in content.items():
        if isinstance(value, Tensor):
            rows = [[None if number != number else number for number in row] for row in value.tolist()]
            content[name] = rows
        elif isinstance(value, tuple):
            content[name] = list(value)
    return content


def _from_dict(cls: type, content: Mapping, table: str, rows: str) -> dict:
    """The fields as `cls` takes them: `table` is its tensor, which has a row for each entry of `rows`."""
    names = {field.name for field in fields(cls)}
    check.expect(set(content) == names, "content", f"the fields {sorted(names)}", sorted(content))
    numbers = [[float("nan") if number is None else number for number in row] for row in content[table]]
    check.expect(
        len(numbers) == len(content[rows]) and len({len(row) for row in numbers}) == 1,
        table,
        f"{len(content[rows])} rows of one length",
        f"{len(numbers)} of the lengths {sorted({len(row) for row in numbers})}",
    )
    lists = {name: tuple(value) for name, value in content.items() if isinstance(value, list)}
    return {**content, **lists, table: torch.tensor(numbers, dtype=torch.float32)}
