"""Attention as a CPU does it fastest, forth and back."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


class _Shared:
    """A setting of the process that several threads may want: the first makes it, the last undoes it."""

    def __init__(self, make: Callable[[], AbstractContextManager]):
        self._make = make
        self._lock = threading.Lock()
        self._inside = 0
        self._made = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._made.enter_context(self._make())
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._made.close()


@contextmanager
def _forced_grouped_queries() -> Iterator[None]:
    """Transformers asks for them under a mask by this variable only, which may be the user's."""
    name = "TRANSFORMERS_SDPA_FORCE_GQA"
    ours = name not in os.environ
    if ours:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if ours:
            os.environ.pop(name, None)


_grouped = _Shared(_forced_grouped_queries)
_products = _Shared(lambda: sdpa_kernel(SDPBackend.MATH))


@contextmanager
def fast_attention(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within, attention of short texts takes a CPU the least time, backwards too; other devices run as ever.

    With fewer keys than queries each key is read where it is, instead of a copy for every query. In bfloat16
    it is computed by plain products, for which processors have units: backwards, torch's fused kernel takes
    five to ten times as long for up to some dozens of tokens (torch 2.13).
    """
    cpu = device.type == "cpu"
    with (
        _grouped() if cpu else nullcontext(),
        _products() if cpu and dtype is torch.bfloat16 else nullcontext(),
    ):
        yield
