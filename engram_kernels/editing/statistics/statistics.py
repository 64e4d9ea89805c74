"""The uncentred second moments of projections' inputs, `C = E[kᵀk]`, and their files (ROME, eq. 2)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from ..._io import load_cached, load_sealed_tensors, save_sealed_tensors
from ..._progress import Progress
from ..._ranks import ALONE, Ranks
from ...errors import EngramError
from ...hf.hooks import Stop, capture, run_until
from ...hf.placement import input_device
from ...hf.projection import Projection
from ...hf.tokens import context_length
from ...ops import second_moment_
from ...ops.waiting import raises_at_once

CHUNK = 512
BATCH = 4
# The end of the name of an unfinished pass's file.
PARTIAL = ".partial.safetensors"


@torch.no_grad()
def second_moments(
    model: torch.nn.Module,
    projections: Sequence[Projection],
    ids: torch.Tensor,
    progress: Progress | None = None,
    sums: dict[int, torch.Tensor] | None = None,
    start: int = 0,
    ranks: Ranks = ALONE,
) -> dict[int, torch.Tensor]:
    """`Σ kᵀk` over the inputs `k [in]` of each projection at every token of `ids`, in float64, in one pass.

    Args:
        model: in evaluation mode.
        projections: whose inputs are observed, at least one.
        ids: `[count]` tokens, cut into chunks of 512 (or the model's context, where that is shorter).
        progress: called after each batch with "statistics", the tokens seen and their number.
        sums: by layer, what is added to in place; None: zeros.
        start: the tokens at the beginning of `ids` that `sums` holds already, a number of those that
            `progress` was called with.
        ranks: of which this one sees every `size`-th batch; the sums are its own.

    Returns:
        The sums: by layer, `[in, in]` float64 on the projection's device.

    Raises:
        EngramError: the inputs are not finite.
    """
    sums = zeros(projections) if sums is None else sums
    context = min(CHUNK, context_length(model) or CHUNK)
    end = len(ids) // context * context
    whole, rest = ids[:end].view(-1, context), ids[end:].view(1, -1)
    seen = 0
    for number, batch in enumerate((*whole.split(BATCH), rest)):
        seen += batch.numel()
        if batch.numel() and seen > start and number % ranks.size == ranks.rank:
            _observe(model, projections, batch, sums)
            if progress:
                progress("statistics", seen, len(ids))
    return sums


def zeros(projections: Sequence[Projection]) -> dict[int, torch.Tensor]:
    """By layer, the second moment of no token: `[in, in]` float64 on the projection's device."""
    matrices = {projection.layer: projection.matrix for projection in projections}
    return {
        layer: torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
        for layer, matrix in matrices.items()
    }


@raises_at_once
def _observe(model, projections: Sequence[Projection], batch: torch.Tensor, sums: dict[int, torch.Tensor]):
    """Add what one forward pass over `batch [rows, length]` gives, and leave no hook behind."""
    deepest = max(projection.layer for projection in projections)

    def observer(projection: Projection):
        def observe(_module, arguments, _keywords):
            try:
                second_moment_(sums[projection.layer], projection.inputs(arguments[0]))
            except ValueError as error:
                # Everything else about the inputs is right by construction.
                raise EngramError(
                    f"model: expected finite inputs to {projection.name!r}, got NaN or infinity"
                ) from error
            if projection.layer == deepest:
                raise Stop

        return observe

    with capture(before={projection.module: observer(projection) for projection in projections}):
        run_until(model, input_ids=batch.to(input_device(model)))


def load_moment(path: Path, anew: bool = True) -> tuple[torch.Tensor, int] | None:
    """A kept moment and its number of tokens, or None where there is none.

    Args:
        path: of the file.
        anew: take a spoilt file for none, with a warning, so that it is computed again.

    Raises:
        EngramError: the file is spoilt, and `anew` is False.
    """
    if anew:
        kept = load_cached(path)
    else:
        try:
            kept = load_sealed_tensors(path)
        except FileNotFoundError:
            kept = None
        except (OSError, ValueError) as error:
            raise EngramError(
                f"cache_dir: expected the statistics as they were written, got {str(path)!r} ({error}); "
                "without the file they are computed again"
            ) from error
    return kept and (kept[0]["moment"], int(kept[0]["count"]))


def save_moment(path: Path, moment: torch.Tensor, count: int) -> None:
    """Write a moment so that readers see either all of it or nothing."""
    save_sealed_tensors(path, {"moment": moment, "count": torch.tensor(count, device="cpu")})


class Checkpoint:
    """The sums of an unfinished pass in one file, so that a pass that was cut off goes on from there.

    Args:
        path: of the file.
        seconds: between two writes. Large sums are written less often: a tenth of the time at most.
    """

    def __init__(self, path: Path, seconds: float):
        self.path = path
        self.seconds = seconds
        self._due = time.monotonic() + seconds

    def load(
        self, projections: Sequence[Projection]
    ) -> tuple[dict[int, torch.Tensor], int, torch.Tensor] | None:
        """The sums by layer, the tokens they hold and all tokens; None where the file cannot be used."""
        kept = load_cached(self.path)
        if kept is None:
            return None
        tensors = kept[0]
        sums = {one.layer: tensors[str(one.layer)].to(one.matrix.device) for one in projections}
        return sums, int(tensors["seen"]), tensors["ids"]

    def save_when_due(self, sums: dict[int, torch.Tensor], seen: int, ids: torch.Tensor) -> None:
        """Write, if the time has come, so that readers see either all of it or what was there before."""
        begun = time.monotonic()
        if begun < self._due:
            return
        tensors = {str(layer): total for layer, total in sums.items()}
        try:
            save_sealed_tensors(self.path, tensors | {"seen": torch.tensor(seen, device="cpu"), "ids": ids})
        except OSError as error:
            # The pass itself is sound: not worth ending it.
            warnings.warn(f"cache_dir: expected room for a checkpoint, got none ({error})", stacklevel=2)
        ended = time.monotonic()
        self._due = ended + max(self.seconds, 9 * (ended - begun))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
