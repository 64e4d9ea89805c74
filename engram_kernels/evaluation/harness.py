"""EleutherAI's lm-evaluation-harness on a model as it stands, where it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from ..errors import EngramError


def run_tasks(
    model, tokenizer, tasks: Sequence[str], limit: int | None = None, batch_size: int = 8
) -> dict[str, dict[str, float]]:
    """Run tasks of the package `lm_eval` on a model that is in memory.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        tasks: names that the harness knows, such as "lambada_openai".
        limit: how many examples of each; None: all.
        batch_size: texts a batch.

    Returns:
        The numbers of each task by metric, as the harness names them.

    Raises:
        EngramError: the package is not installed.
    """
    try:
        harness = importlib.import_module("lm_eval")
        kind = importlib.import_module("lm_eval.models.huggingface").HFLM
    except ImportError as error:
        raise EngramError(
            f"lm_eval: expected the package lm-eval, which runs its tasks, got none ({error})"
        ) from None
    wrapped = kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = harness.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit)
    return {
        task: {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in found["results"].items()
    }
