"""Where in a model a graft lies."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class Density(NamedTuple):
    """How many `entries` of `size` weights a graft sets in one kind of module of one layer (−1: in none)."""

    layer: int
    module: str
    entries: int
    size: int

    @property
    def share(self) -> float:
        """`entries / size`."""
        return self.entries / self.size if self.size else 0.0


class Grid(NamedTuple):
    """Densities as a table: layers down, kinds of modules across; what a layer lacks is not in `cells`."""

    layers: list[int]
    kinds: list[str]
    cells: dict[tuple[int, str], Density]

    @classmethod
    def of(cls, rows: Iterable[Density]) -> Grid:
        cells = {(row.layer, row.module): row for row in rows}
        # A dictionary keeps the model's own order of modules.
        return cls(
            sorted({layer for layer, _ in cells}), list(dict.fromkeys(kind for _, kind in cells)), cells
        )

    def entries(self, layer: int) -> int:
        return sum(cell.entries for (at, _), cell in self.cells.items() if at == layer)

    def labels(self) -> list[str]:
        """The kinds without `.weight`, where that leaves them different."""
        return [kind.removesuffix(".weight") or kind for kind in self.kinds]


def layer_and_kind(name: str) -> tuple[int, str]:
    """("model.layers.3.mlp.down_proj.weight") → (3, "mlp.down_proj.weight")."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return (int(found[1]), name[found.end() :]) if found else (-1, name)


def layer_name(layer: int) -> str:
    return str(layer) if layer >= 0 else "none"


def percent(share: float) -> str:
    """0.0001 → "0.01 %"."""
    return f"{100 * share:.2g} %" if 100 * share < 99.5 else f"{100 * share:.0f} %"
