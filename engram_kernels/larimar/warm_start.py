"""A start for the conditioning, before the decoder is asked: which token a text begins with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..ops import memory_solve
from ..ops.waiting import raises_at_once
from .conditioning import Conditioning


@raises_at_once
def warm_start(
    conditioning: Conditioning,
    latents: Tensor,
    tokens: Tensor,
    embeddings: Tensor,
    steps: int = 1000,
    batch_size: int = 256,
    lr: float = 1e-3,
    noise: float = 0.3,
    ridge: float = 10.0,
    seed: int = 0,
) -> float:
    """Teach the conditioning what texts begin with, before the decoder is asked, which costs far more.

    A linear map, which is thrown away afterwards, takes the hidden layer to token embeddings less their mean;
    it learns to give the right token the highest cosine among those of the batch and others drawn at random.
    Then the offset of the embeddings is set to the ridge regression of the right embeddings on the hidden
    layer's activations: `(HᵀH + λI)⁻¹ Hᵀ E`.

    Args:
        conditioning: with a hidden layer.
        latents: of texts, `[n, latent]`.
        tokens: the decoder's first token of each text, `[n]`.
        embeddings: the decoder's token embeddings, `[vocabulary, size]`.
        steps: of AdamW, the learning rate falling to 0.
        batch_size: texts a step.
        lr: the first learning rate.
        noise: standard deviation of noise on the latents, whose entries have the root mean square 1.
        ridge: λ.
        seed: of everything drawn.

    Returns:
        The mean loss of the last tenth of the steps.

    Raises:
        ValueError: no hidden layer, or no texts.
    """
    check.expect(conditioning.hidden is not None, "conditioning", "a hidden layer", "none")
    check.expect(len(latents) > 0, "latents", "some", "none")
    # Drawn on the CPU, so that every device has the same; named, as the caller may have other defaults.
    drawn = {"generator": torch.Generator("cpu").manual_seed(seed), "device": "cpu"}
    noisy = {**drawn, "dtype": torch.float32}
    centred = (embeddings - embeddings.mean(0)).detach()
    targets = nn.functional.normalize(centred, dim=-1)
    hidden, known = conditioning.hidden, tokens.unique()
    head = torch.randn(embeddings.shape[1], hidden.out_features, **noisy).to(hidden.weight)
    head = nn.Parameter(head / hidden.out_features**0.5)
    scale = nn.Parameter(hidden.weight.new_tensor(10.0))
    optimizer = torch.optim.AdamW([*hidden.parameters(), head, scale], lr=lr, weight_decay=0.1)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    for _ in range(steps):
        rows = torch.randint(0, len(latents), (batch_size,), **drawn)
        others = known[torch.randint(0, len(known), (8 * batch_size,), **drawn)]
        candidates = torch.cat([tokens[rows], others])
        x = conditioning.scaled(latents[rows])
        x = x + noise * torch.randn(x.shape, **noisy).to(x)
        found = nn.functional.normalize(conditioning.activated(x) @ head.T, dim=-1)
        scores = scale * found @ targets[candidates].T
        # The same token elsewhere among the candidates is no wrong answer.
        twin = candidates == tokens[rows, None]
        twin.fill_diagonal_(False)
        right = torch.arange(batch_size, device=scores.device)
        loss = nn.functional.cross_entropy(scores.masked_fill(twin, -torch.inf), right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        losses.append(loss.item())
    with torch.no_grad():
        activations = conditioning.activated(conditioning.scaled(latents)).double()
        # A column of ones stands for the bias.
        rows = torch.cat([activations, torch.ones_like(activations[:, :1])], 1)
        found = memory_solve(rows.T @ rows, rows.T @ centred[tokens].double(), ridge=ridge)
        conditioning.offset.weight.copy_(found[:-1].T)
        conditioning.offset.bias.copy_(found[-1])
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)
