"""The uncentred second moment of a projection's inputs, `C = E[kᵀk]`, and its cache on disk (ROME, eq. 2)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import EngramError
from ..functional import second_moment_
from ..models.digest import tensor_bytes
from ..models.files import new_file
from ..models.layers import decoder_layers
from .structure import Projection
from .tokens import context_length

CHUNK = 512
BATCH = 4


class _Reached(Exception):
    """Stops a forward pass at the edited layer: nothing above it is needed."""


def weights_fingerprint(model: torch.nn.Module, projection: Projection) -> str:
    """A digest of the configuration and of every tensor on which the projection's inputs depend.

    The statistics of a layer outlive edits of that layer, and of the layers above it.
    """
    # Where a model came from, and by which version, says nothing about what it computes.
    irrelevant = ("_name_or_path", "transformers_version")
    settings = {name: value for name, value in model.config.to_dict().items() if name not in irrelevant}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in _feeding(model, projection):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def weights_state(model: torch.nn.Module, projection: Projection) -> tuple:
    """What tells at no cost whether a tensor under `weights_fingerprint` was replaced or written since.

    Only writes through `.data` go unseen. Inference tensors count no writes: each state of one is a new one.
    """
    return tuple(
        (name, tensor.data_ptr(), object() if tensor.is_inference() else tensor._version)
        for name, tensor in _feeding(model, projection)
    )


def _feeding(model: torch.nn.Module, projection: Projection) -> list[tuple[str, torch.Tensor]]:
    """The tensors on which the projection's inputs depend: not its own weight, nor the layers above it."""
    stack, layers = decoder_layers(model)
    skipped = [f"{stack}.{i}." for i in range(projection.layer + 1, len(layers))] + [projection.name + "."]
    return [
        (name, tensor)
        for name, tensor in sorted(model.state_dict().items())
        if not name.startswith(tuple(skipped))
    ]


@torch.no_grad()
def second_moment(
    model: torch.nn.Module,
    projection: Projection,
    ids: torch.Tensor,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """`Σ kᵀk` over the inputs `k [in]` of the projection at every token of `ids`, in float64.

    Args:
        model: in evaluation mode.
        projection: whose inputs are observed.
        ids: `[count]` tokens, cut into chunks of 512 (or the model's context, where that is shorter).
        progress: called with the tokens seen and their number.

    Returns:
        `[in, in]` float64, on the projection's device.

    Raises:
        EngramError: the inputs are not finite.
    """
    width = projection.matrix.shape[1]
    accumulator = torch.zeros(width, width, dtype=torch.float64, device=projection.matrix.device)

    def observe(_module, inputs):
        try:
            second_moment_(accumulator, inputs[0])
        except ValueError as error:
            # Everything else about the inputs is right by construction.
            raise EngramError(
                f"model: expected finite inputs to {projection.name!r}, got NaN or infinity"
            ) from error
        raise _Reached

    context = min(CHUNK, context_length(model) or CHUNK)
    end = len(ids) // context * context
    whole, rest = ids[:end].view(-1, context), ids[end:].view(1, -1)
    batches = [batch for batch in (*whole.split(BATCH), rest) if batch.numel()]
    device = model.get_input_embeddings().weight.device
    hook = projection.module.register_forward_pre_hook(observe)
    seen = 0
    try:
        for batch in batches:
            try:
                model(input_ids=batch.to(device), use_cache=False)
            except _Reached:
                pass
            seen += batch.numel()
            if progress:
                progress(seen, len(ids))
    finally:
        hook.remove()
    return accumulator


def load_moment(path: Path) -> tuple[torch.Tensor, int] | None:
    """A cached moment and its number of tokens, or None where there is none that can be read."""
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        return tensors["moment"], int(tensors["count"])
    except Exception:
        # Whatever is wrong with a cache entry, computing it again is the cure.
        return None


def save_moment(path: Path, moment: torch.Tensor, count: int) -> None:
    """Write a moment so that readers see either all of it or nothing."""
    from safetensors.torch import save

    # Not save_file, whose files only their owner may read.
    with new_file(path) as temporary:
        temporary.write_bytes(save({"moment": moment.cpu().contiguous(), "count": torch.tensor(count)}))
