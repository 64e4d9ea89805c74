"""The ridge memory under the interface of flash-linear-attention's layers."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks as check
from ..errors import EngramError
from ..layers import MemoryState, RidgeMemory
from ..ops import RidgeState


class FlaRidgeMemory(RidgeMemory):
    """`RidgeMemory` as flash-linear-attention calls its layers: a padding mask, its cache, three results.

    Args:
        hidden_size: the width of the model.
        layer_idx: the layer's place in the model's cache.
        mode: taken and ignored, as every layer of that library has one.
        **options: as of `RidgeMemory`.

    Example:
        >>> ek.integrations.register_with_fla()
        >>> layer = fla.layers.RidgeMemory(hidden_size=2048, num_heads=16, head_dim=128, layer_idx=0)
    """

    def __init__(
        self, hidden_size: int = 2048, layer_idx: int | None = None, mode: str = "chunk", **options: Any
    ) -> None:
        super().__init__(hidden_size, **options)
        self.mode, self.layer_idx = mode, layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **options: Any,
    ) -> tuple[Tensor, None, Any]:
        """Mix the tokens of sequences that may be padded.

        Args:
            hidden_states: [B, T, D].
            attention_mask: 0 where a token is padding, [B, T].
            past_key_values: the library's cache.
            use_cache: whether to keep the state in it.
            output_attentions: there are none.
            **options: `cu_seqlens`, where packed sequences begin and end; what else other layers take.

        Returns:
            [B, T, D], None, and the cache.
        """
        cu_seqlens, state = options.get("cu_seqlens"), None
        if past_key_values is not None:
            check.integer("layer_idx", self.layer_idx, at_least=0)
            assert self.layer_idx is not None
            if len(past_key_values) > self.layer_idx:
                kept = past_key_values[self.layer_idx]
                memory = kept["recurrent_state"]
                memory = RidgeState(*memory) if self.rule == "ridge" else memory
                state = MemoryState(memory, *(kept["conv_state"] or (None, None)))
        length = hidden_states.shape[1]
        if attention_mask is not None and not bool(attention_mask[:, -length:].all()):
            expected = "None where tokens are padded"
            check.expect(past_key_values is None and cu_seqlens is None, "past_key_values", expected, "one")
            mask = attention_mask[:, -length:].bool()
            rows = hidden_states[mask].unsqueeze(0)
            packed, _ = super().forward(rows, cu_seqlens=F.pad(mask.sum(1).cumsum(0), (1, 0)))
            out = torch.zeros_like(hidden_states).masked_scatter(mask.unsqueeze(-1), packed)
            return out, None, past_key_values
        out, state = super().forward(hidden_states, state, cu_seqlens)
        if past_key_values is not None and use_cache:
            past_key_values.update(
                recurrent_state=tuple(state.memory) if self.rule == "ridge" else state.memory,
                conv_state=(state.queries, state.keys),
                layer_idx=self.layer_idx,
                offset=length,
            )
        return out, None, past_key_values


def register() -> type[FlaRidgeMemory]:
    """Make it `fla.layers.RidgeMemory`."""
    try:
        layers = importlib.import_module("fla.layers")
    except ImportError as error:
        raise EngramError(f"flash-linear-attention cannot be imported: {error}") from error
    setattr(layers, "RidgeMemory", FlaRidgeMemory)  # noqa: B010
    return FlaRidgeMemory
