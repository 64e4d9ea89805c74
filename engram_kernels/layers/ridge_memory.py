"""A layer that reads a memory of all tokens before: by ridge regression, the delta rule or Hebb's."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks as check
from ..ops import RidgeState, delta_memory, hebbian_memory, ridge_memory
from .short_convolution import ShortConvolution

RULES = ("ridge", "delta", "hebbian")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class MemoryState(NamedTuple):
    """What a layer keeps of the tokens so far.

    Attributes:
        memory: the operator's state: a `RidgeState`, or the matrix [N, H, K, V] of the other rules.
        queries: what the short convolution of the queries needs of the last tokens, or None without one.
        keys: what that of the keys needs.
    """

    memory: RidgeState | Tensor
    queries: Tensor | None
    keys: Tensor | None


class Memory(nn.Module):
    """What all layers have in common: gates, the ridge, and the operator of a rule.

    Args:
        hidden_size: the width of the model.
        num_heads: how many memories there are side by side.
        rule: "ridge", "delta" or "hebbian".
        use_decay: whether a gate says at each token how much is kept.
        ridge: what λ begins with, of each head and dimension; it is learnt, above `ridge_floor`.
        ridge_floor: what λ stays above.
        ridge_decays: whether the ridge decays with the memory (`ridge_memory`).
        head_dim: the size of keys.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        rule: str,
        use_decay: bool,
        ridge: float,
        ridge_floor: float,
        ridge_decays: bool,
    ) -> None:
        super().__init__()
        check.expect(rule in RULES, "rule", f"one of {', '.join(RULES)}", repr(rule))
        check.number("ridge_floor", ridge_floor, above=0)
        check.number("ridge", ridge, above=ridge_floor)
        self.rule, self.ridge_floor, self.ridge_decays = rule, ridge_floor, ridge_decays
        self.b_proj = nn.Linear(hidden_size, num_heads)
        self.a_proj = nn.Linear(hidden_size, num_heads) if use_decay else None
        if self.a_proj is not None:
            nn.init.constant_(self.a_proj.bias, 4.0)  # γ = 0.98: a memory that forgets little, to begin with
        if rule == "ridge":
            above = torch.tensor(ridge - ridge_floor, dtype=torch.float64).expm1().log()
            self.ridge_logits = nn.Parameter(torch.full((num_heads, head_dim), float(above)))

    def ridge(self) -> Tensor:
        """λ of each head and dimension, [H, K]."""
        return F.softplus(_wide(self.ridge_logits)) + self.ridge_floor

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """β and log γ of each token and head, [B, T, H], in fp32 or wider."""
        decay = None if self.a_proj is None else F.logsigmoid(_wide(self.a_proj(x)))
        return _wide(self.b_proj(x)).sigmoid(), decay

    def read(self, q, k, v, beta, decay, state, cu_seqlens) -> tuple[Tensor, RidgeState | Tensor]:
        """The operator of the rule, on queries and keys of length 1."""
        # Of zeros, as of padding, zeros: the usual 1e-12 is 0 in fp16.
        tiny = max(1e-12, torch.finfo(q.dtype).tiny)
        q, k = F.normalize(q, dim=-1, eps=tiny), F.normalize(k, dim=-1, eps=tiny)
        if self.rule == "ridge":
            ridge = self.ridge()
            return ridge_memory(q, k, v, beta, decay, ridge, state, cu_seqlens, self.ridge_decays)
        rule = delta_memory if self.rule == "delta" else hebbian_memory
        return rule(q, k, v, beta, decay, state, cu_seqlens)


class RidgeMemory(Memory):
    """A token mixer: keys and values of every token are written, its query is read, `oₜ = qₜ(Hₜ + Λ)⁻¹Gₜ`.

    Queries and keys pass a short convolution and have length 1; sigmoid gates say how strongly a pair is
    written (β) and how much is kept (γ); the readout is normalised, and gated if asked. With the rule "delta"
    or "hebbian" all stays the same but the operator.

    Args:
        hidden_size: the width of the model, D.
        num_heads: H.
        head_dim: the size of keys and values.
        rule: "ridge", "delta" or "hebbian".
        use_decay: whether γ is a gate; if not, nothing is forgotten.
        use_output_gate: whether `silu` of a projection gates the readout.
        use_short_conv: whether queries and keys see the tokens just before.
        conv_size: how many tokens the convolution spans.
        ridge: what λ begins with.
        ridge_floor: what λ stays above. The solve is exact: a small λ is safe.
        ridge_decays: whether the ridge decays with the memory: cheaper with a decay, see `ridge_memory`.
        norm_eps: of the readout's normalisation.

    Raises:
        ValueError: an unknown rule; a ridge not above its floor.

    Example:
        >>> layer = ek.layers.RidgeMemory(hidden_size=128, num_heads=2, head_dim=64)
        >>> out, state = layer(torch.randn(1, 100, 128))
        >>> out, state = layer(torch.randn(1, 1, 128), state)

    Source: von Oswald et al. 2025 (MesaNet, arXiv 2506.05233), whose layer solves by conjugate gradients.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        head_dim: int = 64,
        rule: str = "ridge",
        use_decay: bool = True,
        use_output_gate: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        ridge: float = 1.0,
        ridge_floor: float = 1e-3,
        ridge_decays: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(hidden_size, num_heads, head_dim, rule, use_decay, ridge, ridge_floor, ridge_decays)
        width = num_heads * head_dim
        self.num_heads, self.head_dim = num_heads, head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden_size, width, bias=False) for _ in range(3))
        self.q_conv = ShortConvolution(width, conv_size) if use_short_conv else None
        self.k_conv = ShortConvolution(width, conv_size) if use_short_conv else None
        self.g_proj = nn.Linear(hidden_size, width, bias=False) if use_output_gate else None
        self.o_norm = nn.RMSNorm(head_dim, eps=norm_eps)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(
        self, x: Tensor, state: MemoryState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MemoryState]:
        """Mix the tokens.

        Args:
            x: [B, T, D].
            state: what the call on the tokens before returned.
            cu_seqlens: where packed sequences begin and end, [N + 1]; then B is 1, and there is no state.

        Returns:
            [B, T, D], and the state after the last token.

        Raises:
            ValueError: wrong shape; a state together with packed sequences.
        """
        check.dimensions("x", x, "[B, T, D]")
        packed = state is not None and cu_seqlens is not None
        check.expect(not packed, "state", "None where sequences are packed by cu_seqlens", "a state")
        memory, before_q, before_k = state or (None, None, None)
        q, k = self.q_proj(x), self.k_proj(x)
        if self.q_conv is not None:
            q, before_q = self.q_conv(q, before_q, cu_seqlens)
            k, before_k = self.k_conv(k, before_k, cu_seqlens)
        q, k, v = (rows.unflatten(-1, (self.num_heads, -1)) for rows in (q, k, self.v_proj(x)))
        out, memory = self.read(q, k, v, *self.gates(x), memory, cu_seqlens)
        out = self.o_norm(out)
        if self.g_proj is not None:
            out = out * F.silu(self.g_proj(x)).unflatten(-1, (self.num_heads, -1))
        return self.o_proj(out.flatten(-2)), MemoryState(memory, before_q, before_k)

    def extra_repr(self) -> str:
        return f"rule={self.rule!r}, heads={self.num_heads}, head_dim={self.head_dim}"
