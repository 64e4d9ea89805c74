"""Sequences of tokens cut into chunks, whole or packed: what the sequence memories compute on."""

import torch
from torch import Tensor

SIZE = 64


class Chunks:
    """[B, T, H, ...] as [chunks, H, C, ...], with zeros behind the last token of a sequence, and back.

    `steps` says for each position in a sequence which chunks stand there, and of which sequences: the chunks
    of one step depend on those of the step before, and not on each other.
    """

    def __init__(self, tokens: Tensor, cu_seqlens: Tensor | None, size: int | None = None):
        batch, length = tokens.shape[:2]
        device = tokens.device
        if cu_seqlens is None:
            ends = torch.arange(batch + 1) * length
        else:
            ends = cu_seqlens.cpu().long()
        lengths = ends.diff()
        self.shape = (batch, length)
        self.size = max(1, min(size or SIZE, max(lengths.tolist(), default=0)))
        counts = -(-lengths // self.size)
        sequence = torch.repeat_interleave(torch.arange(len(lengths)), counts)
        step = torch.arange(len(sequence)) - (counts.cumsum(0) - counts)[sequence]
        # Whole chunks need no index, and on a GPU no copy of one.
        self._whole = bool((lengths % self.size == 0).all())
        if not self._whole:
            rows = (ends[sequence] + step * self.size)[:, None] + torch.arange(self.size)
            inside = rows < ends[sequence + 1][:, None]
            # Behind the end of a sequence stands the row of zeros behind all tokens.
            self._rows = rows.masked_fill(~inside, batch * length).flatten().to(device)
            self._places = inside.flatten().nonzero().squeeze(1).to(device)
        count = max(counts.tolist(), default=0)
        if bool((counts == count).all()):
            self.steps = [(slice(i, None, count), slice(None)) for i in range(count)]
        else:
            self.steps = [
                ((step == i).nonzero().squeeze(1).to(device), sequence[step == i].to(device))
                for i in range(count)
            ]

    def split(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """[B, T, H, ...] -> [chunks, H, C, ...]."""
        x = x.flatten(0, 1)
        if not self._whole:
            x = torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, self._rows)
        x = x.unflatten(0, (-1, self.size)).transpose(1, 2)
        return x.to(dtype, memory_format=torch.contiguous_format)

    def join(self, x: Tensor) -> Tensor:
        """[chunks, H, C, ...] -> [B, T, H, ...]."""
        x = x.transpose(1, 2).flatten(0, 1)
        if not self._whole:
            x = x.index_select(0, self._places)
        return x.unflatten(0, self.shape).contiguous()

    def scan(
        self, state: Tensor, increments: Tensor, log_decay: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """state ← e^log_decay · state + increment over the chunks of each sequence, forwards or backwards.

        Args:
            state: before the first chunk of each sequence, [N, H, ...].
            increments: of each chunk, [chunks, H, ...].
            log_decay: of each chunk, [chunks, H].

        Returns:
            The state as each chunk meets it, [chunks, H, ...], and after the last.
        """
        state, before = state.clone(), torch.empty_like(increments)
        factors = (
            None if log_decay is None else log_decay.exp().view(*log_decay.shape, *[1] * (state.dim() - 2))
        )
        for chunks, sequences in reversed(self.steps) if reverse else self.steps:
            now = state[sequences]
            before[chunks] = now
            state[sequences] = increments[chunks] + (now if factors is None else now * factors[chunks])
        return before, state


def pairwise_decay(log_decay: Tensor) -> Tensor:
    """e^(gᵢ − gⱼ) for j ≤ i, else 0, of cumulated logarithms g [..., C]: [..., C, C]."""
    difference = log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)
    later = torch.ones(difference.shape[-2:], dtype=torch.bool, device=difference.device).triu(1)
    return difference.masked_fill(later, -torch.inf).exp()
