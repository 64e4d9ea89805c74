"""Several memories, of which each token writes and reads a few."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks as check
from ..ops import RidgeState
from .ridge_memory import Memory


class MixtureOfMemories(Memory):
    """A token mixer of M memories: a router sends each token to its top k of them, and weighs what they read.

    Each memory has its own projections to keys and values, and sees the subsequence of the tokens that it
    gets. These are packed one behind the other, so that all memories of all sequences are one call of the
    operator with `cu_seqlens`. A memory that all tokens share stands beside them if asked.

    Args:
        hidden_size: the width of the model, D.
        num_memories: M.
        top_k: how many memories a token goes to.
        num_heads: H, of each memory.
        head_dim: the size of keys and values.
        shared: whether there is one more memory, which gets every token with weight 1.
        rule: "ridge", "delta" or "hebbian".
        use_decay: whether γ is a gate; if not, nothing is forgotten.
        ridge: what λ begins with.
        ridge_floor: what λ stays above.
        ridge_decays: whether the ridge decays with the memory.
        norm_eps: of the readout's normalisation.

    Raises:
        ValueError: more memories for a token than there are; an unknown rule; a ridge not above its floor.

    Example:
        >>> layer = ek.layers.MixtureOfMemories(hidden_size=128, num_memories=4, top_k=2, num_heads=1)
        >>> out, state = layer(torch.randn(2, 100, 128))

    Source: Du et al. 2025 (MoM, arXiv 2502.13685).
    """

    def __init__(
        self,
        hidden_size: int,
        num_memories: int = 4,
        top_k: int = 2,
        num_heads: int = 4,
        head_dim: int = 64,
        shared: bool = True,
        rule: str = "ridge",
        use_decay: bool = True,
        ridge: float = 1.0,
        ridge_floor: float = 1e-3,
        ridge_decays: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(hidden_size, num_heads, head_dim, rule, use_decay, ridge, ridge_floor, ridge_decays)
        check.integer("num_memories", num_memories, at_least=1)
        check.integer("top_k", top_k, at_least=1)
        check.expect(top_k <= num_memories, "top_k", f"at most num_memories, {num_memories}", top_k)
        width, total = num_heads * head_dim, num_memories + shared
        self.num_heads, self.num_memories, self.top_k, self.shared = num_heads, num_memories, top_k, shared
        self.router = nn.Linear(hidden_size, num_memories, bias=False)
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.kv_projs = nn.ModuleList(nn.Linear(hidden_size, 2 * width, bias=False) for _ in range(total))
        self.o_norm = nn.RMSNorm(head_dim, eps=norm_eps)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The memories of each token, [B, T, k], a shared one last, and their weights."""
        weights, memories = self.router(x).softmax(-1, dtype=torch.float32).topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        if self.shared:
            memories = F.pad(memories, (0, 1), value=self.num_memories)
            weights = F.pad(weights, (0, 1), value=1.0)
        return memories, weights

    def forward(
        self, x: Tensor, state: RidgeState | Tensor | None = None
    ) -> tuple[Tensor, RidgeState | Tensor]:
        """Mix the tokens.

        Args:
            x: [B, T, D].
            state: what the call on the tokens before returned: of every memory and sequence.

        Returns:
            [B, T, D], and the states after the last token, [M · B, ...] memory by memory.
        """
        check.dimensions("x", x, "[B, T, D]")
        batch, length = x.shape[:2]
        memories, weights = self.route(x)
        each = memories.shape[-1]
        # Memory by memory, in it sequence by sequence, in it as time goes: a stable sort of the routes.
        sequence = torch.arange(batch, device=x.device)[:, None, None]
        owner = (memories * batch + sequence).flatten()
        order = owner.argsort(stable=True)
        counts = owner.bincount(minlength=len(self.kv_projs) * batch)
        ends = F.pad(counts.cumsum(0), (1, 0))
        token = order // each
        rows = x.flatten(0, 1)[token]
        of_memory = counts.view(-1, batch).sum(1).tolist()
        projected = [proj(part) for proj, part in zip(self.kv_projs, rows.split(of_memory), strict=True)]

        def heads(rows: Tensor) -> Tensor:
            return rows.unflatten(-1, (self.num_heads, -1)).unsqueeze(0)

        k, v = map(heads, torch.cat(projected).chunk(2, -1))
        q = heads(self.q_proj(x).flatten(0, 1)[token])
        beta, decay = (gate if gate is None else gate.flatten(0, 1)[token][None] for gate in self.gates(x))
        out, state = self.read(q, k, v, beta, decay, state, ends)
        weighed = self.o_norm(out[0]) * weights.flatten()[order].to(out.dtype)[:, None, None]
        mixed = torch.zeros(batch * length, *out.shape[2:], dtype=weighed.dtype, device=x.device)
        mixed = mixed.index_add(0, token, weighed)
        return self.o_proj(mixed.flatten(-2)).unflatten(0, (batch, length)), state

    def extra_repr(self) -> str:
        return f"rule={self.rule!r}, memories={self.num_memories}, top_k={self.top_k}, shared={self.shared}"
