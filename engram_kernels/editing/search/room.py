"""How many values fit into a device's memory side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...hf.layers import decoder_layers
from ...hf.projection import Projection
from .batching import EncodedEdit

# Of the free memory; the rest is for what the allocator cannot join, and for the first whole passes.
SHARE = 0.5
# What a layer keeps of a token for the backward pass, in states of either width: Llama's keeps its input,
# two norms, queries, keys, values, attention's and the MLP's outputs; and gate, up, their product.
HIDDEN, INNER = 10, 4


def edits_that_fit(
    model: nn.Module, projection: Projection, encoded: Sequence[EncodedEdit], device: torch.device
) -> int | None:
    """For how many of some edits a device has room, by what their activations take; None on a CPU.

    An estimate, which a search that runs out of memory halves. Not run on a GPU.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, int(SHARE * free / max(bytes_of(model, projection, one) for one in encoded)))


def bytes_of(model: nn.Module, projection: Projection, encoded: EncodedEdit) -> int:
    """The memory of one edit's search: activations of the layers above, and logits with their gradient."""
    rows = encoded.size
    hidden, inner = projection.matrix.shape
    above = len(decoder_layers(model)[1]) - projection.layer
    tokens = rows * encoded.span[0]
    states = above * (HIDDEN * hidden + INNER * inner) * projection.matrix.element_size()
    # Those of a target, the one after it, and the KL prompt's.
    places = sum(len(row.ids) - row.target + 1 for row in encoded.rows) + 1
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # Logits in the model's type and in float32, their softmax and gradient.
    return tokens * states + places * vocabulary * (projection.matrix.element_size() + 12)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)
