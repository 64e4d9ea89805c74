"""Other weights in a model's parameters, for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


@contextmanager
def swapped_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Run a model with other weights, given by name, for a while; its own are not copied."""
    named = dict(model.named_parameters())
    own = {name: named[name].data for name in weights}
    try:
        for name, weight in weights.items():
            named[name].data = weight.to(named[name].device)
        # A caller's autocast keeps copies of the weights that stood there.
        torch.clear_autocast_cache()
        yield
    finally:
        for name, weight in own.items():
            named[name].data = weight
        torch.clear_autocast_cache()
