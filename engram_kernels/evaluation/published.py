"""Published figures on CounterFact, as context: other models, other samples, other numbers of edits.

Shares are those of efficacy, paraphrase and neighbourhood success (ES, PS, NS), and of their harmonic mean S
where the paper prints it; fluency is the paper's generation entropy GE over a hundred, in bits.

Sources:
    ROME: Meng et al. 2022, arXiv 2202.05262, table 4: one edit at a time, 7,500 cases (GPT-2 XL) and 2,000
        (GPT-J 6B).
    MEMIT: Meng et al. 2023, arXiv 2210.07229, table 2: 10,000 edits of GPT-J 6B at once.
    AlphaEdit: Fang et al. 2024, arXiv 2410.02355, table 1: 2,000 edits of Llama-3 8B, a hundred at a time.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """A row of a paper's table."""

    method: str
    model: str
    edits: str
    figures: dict[str, float]


def _figures(efficacy: float, paraphrase: float, locality: float, fluency: float, score: float | None = None):
    percent = {"efficacy": efficacy, "paraphrase": paraphrase, "locality": locality, "fluency": fluency}
    if score is not None:
        percent["score"] = score
    return {name: value / 100 for name, value in percent.items()}


COUNTERFACT_FIGURES = (
    Published("ROME", "GPT-2 XL", "1 at a time", _figures(100.0, 96.4, 75.4, 621.9, 89.2)),
    Published("ROME", "GPT-J 6B", "1 at a time", _figures(99.9, 99.1, 78.9, 620.1, 91.5)),
    Published("MEMIT", "GPT-J 6B", "10,000", _figures(98.9, 88.6, 73.7, 619.9, 85.8)),
    Published("AlphaEdit", "Llama-3 8B", "2,000", _figures(98.90, 94.22, 67.88, 622.49)),
)
