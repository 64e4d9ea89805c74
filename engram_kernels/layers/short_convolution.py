"""A causal convolution over a few tokens of each channel, which lets a key see what stands before it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ShortConvolution(nn.Module):
    """`silu(Σₛ wₛ xₜ₋ₛ)` over the last few tokens, each channel for itself.

    Args:
        width: how many channels.
        size: how many tokens, the current one among them.
    """

    def __init__(self, width: int, size: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, width))
        nn.init.uniform_(self.weight, -(size**-0.5), size**-0.5)

    def forward(
        self, x: Tensor, before: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the convolved tokens [B, T, D], and the last tokens that the next call needs.

        Args:
            x: [B, T, D].
            before: the size − 1 tokens before x, [B, size − 1, D]; zeros if None.
            cu_seqlens: where packed sequences begin and end: none sees the one before it.
        """
        size = self.weight.shape[0]
        if before is None:
            before = x.new_zeros(x.shape[0], size - 1, x.shape[2])
        rows = torch.cat([before, x], 1)
        count, out = x.shape[1], x * self.weight[0]
        for s in range(1, size):
            shifted = rows[:, size - 1 - s : size - 1 - s + count]
            if cu_seqlens is not None:
                place = torch.arange(count, device=x.device)
                start = cu_seqlens[torch.searchsorted(cu_seqlens, place, right=True) - 1]
                shifted = shifted * (place - start >= s).to(x.dtype)[None, :, None]
            out = out + shifted * self.weight[s]
        return F.silu(out), rows[:, count:]
