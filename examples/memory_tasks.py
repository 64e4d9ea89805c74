"""Tasks that tell Hebb's rule, the delta rule, ridge regression and softmax attention apart.

Every function takes the rule's name and seeds of its own. The first two need no training: what a rule makes
of given keys and values. The third trains a small model of two layers of which only the rule differs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import engram_kernels as ek
from engram_kernels._progress import Progress
from engram_kernels.layers import RidgeMemory

RULES = ("ridge", "delta", "hebbian", "softmax")


def read(rule: str, q: Tensor, k: Tensor, v: Tensor, ridge: float = 1e-3) -> Tensor:
    """The readouts of queries [B, Q, K] after the pairs k [B, N, K], v [B, N, V]."""
    if rule == "softmax":
        return torch.softmax(8 * q @ k.mT, -1) @ v
    k, v = k.unsqueeze(2), v.unsqueeze(2)
    if rule == "ridge":
        state = ek.ridge_memory(k, k, v, ridge=ridge)[1]
        system = state.gram[:, 0] + ridge * torch.eye(k.shape[-1], dtype=torch.float64)
        return q @ torch.linalg.solve(system, state.cross[:, 0]).to(q.dtype)
    function = ek.delta_memory if rule == "delta" else ek.hebbian_memory
    return q @ function(k, k, v)[1][:, 0]


def recall(rule: str, pairs: int, keys: int = 64, values: int = 64, batch: int = 64, seed: int = 0) -> float:
    """The share of pairs whose own value is nearest, by cosine, to what their key reads at the end.

    Values are random; keys have one direction in common, as those of a model do: their cosines are about 0.5.
    """
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(batch, 1, keys, generator=generator)
    k = F.normalize(torch.randn(batch, pairs, keys, generator=generator) + common, dim=-1)
    v = F.normalize(torch.randn(batch, pairs, values, generator=generator), dim=-1)
    nearest = (F.normalize(read(rule, k, k, v), dim=-1) @ v.mT).argmax(-1)
    return float((nearest == torch.arange(pairs)).float().mean())


def regression(rule: str, pairs: int, width: int = 32, noise: float = 0.3, seed: int = 0) -> float:
    """In-context regression: the squared error at new points after `pairs` noisy ones, over that of 0."""
    generator = torch.Generator().manual_seed(seed)
    batch, queries = 64, 16
    weight = torch.randn(batch, width, 1, generator=generator) / width**0.5
    k = torch.randn(batch, pairs, width, generator=generator)
    q = torch.randn(batch, queries, width, generator=generator)
    v = k @ weight + noise * torch.randn(batch, pairs, 1, generator=generator)
    length = width**0.5  # the delta rule is stable for keys of length 1
    # The ridge that is right for this noise and this prior, for keys of that length.
    predicted = read(rule, q / length, k / length, v, ridge=noise**2)
    return float((predicted - q @ weight).square().mean() / (q @ weight).square().mean())


class SoftmaxMemory(RidgeMemory):
    """The same layer with softmax attention in place of the memory."""

    def read(self, q, k, v, beta, decay, state, cu_seqlens):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2), None


class Mixer(nn.Module):
    """Two layers of a memory and a small perceptron each, between an embedding and a head."""

    def __init__(self, rule: str, vocabulary: int, hidden: int, head_dim: int) -> None:
        super().__init__()
        options = {"num_heads": 1, "head_dim": head_dim, "use_decay": False, "ridge": 0.1}
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.mixers, self.perceptrons = nn.ModuleList(), nn.ModuleList()
        for _ in range(2):
            softmax = rule == "softmax"
            self.mixers.append(
                SoftmaxMemory(hidden, **options) if softmax else RidgeMemory(hidden, rule=rule, **options)
            )
            self.perceptrons.append(
                nn.Sequential(
                    nn.RMSNorm(hidden),
                    nn.Linear(hidden, 2 * hidden),
                    nn.SiLU(),
                    nn.Linear(2 * hidden, hidden),
                )
            )
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(2))
        self.head = nn.Sequential(nn.RMSNorm(hidden), nn.Linear(hidden, vocabulary))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for norm, mixer, perceptron in zip(self.norms, self.mixers, self.perceptrons, strict=True):
            x = x + mixer(norm(x))[0]
            x = x + perceptron(x)
        return self.head(x)


def queries(pairs: int, words: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall: pairs of a key and a value, then all keys anew; the answers' values.

    Keys are the first `words` tokens, values the others.
    """
    keys = torch.rand(batch, words, generator=generator).argsort(-1)[:, :pairs]
    values = torch.randint(words, 2 * words, (batch, pairs), generator=generator)
    order = torch.rand(batch, pairs, generator=generator).argsort(-1)
    written = torch.stack([keys, values], -1).flatten(1)
    return torch.cat([written, keys.gather(1, order)], 1), values.gather(1, order)


def train(
    rule: str,
    steps: int,
    pairs: tuple[int, ...],
    words: int = 64,
    hidden: int = 64,
    head_dim: int = 16,
    batch: int = 32,
    lr: float = 4e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> Mixer:
    """Train on sequences of each number of pairs in turn."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Mixer(rule, 2 * words, hidden, head_dim)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        tokens, answers = queries(pairs[step % len(pairs)], words, batch, generator)
        logits = model(tokens)[:, -answers.shape[1] :]
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(f"{rule}, seed {seed}, loss {loss.item():.3f}", step + 1, steps)
    return model


@torch.no_grad()
def accuracy(model: Mixer, pairs: int, words: int = 64, batch: int = 256, seed: int = 1000) -> float:
    """The share of queries whose value is the most likely token."""
    tokens, answers = queries(pairs, words, batch, torch.Generator().manual_seed(seed))
    return float((model(tokens)[:, -answers.shape[1] :].argmax(-1) == answers).float().mean())


def continual(rule: str, tasks: int = 8, pairs: int = 8, keys: int = 64, seed: int = 0) -> list[list[float]]:
    """Tasks one after the other into one state: the squared error of each task's values after each task.

    Over that of 0, [after][task]. Keys and values are random, of length 1; nothing decays.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = 64
    k = F.normalize(torch.randn(batch, tasks, pairs, keys, generator=generator), dim=-1)
    v = F.normalize(torch.randn(batch, tasks, pairs, keys, generator=generator), dim=-1)
    found = []
    for done in range(1, tasks + 1):
        written = (x[:, :done].flatten(1, 2) for x in (k, v))
        readouts = read(rule, k[:, :done].flatten(1, 2), *written)
        errors = (readouts - v[:, :done].flatten(1, 2)).square().sum(-1)
        found.append(errors.mean(0).view(done, pairs).mean(-1).tolist())
    return found


def unlearning(pairs: int = 48, keys: int = 64, seed: int = 0) -> dict[str, float]:
    """One pair taken out of a ridge memory, beside the memory that never saw it."""
    generator = torch.Generator().manual_seed(seed)
    k = F.normalize(torch.randn(1, pairs, 1, keys, generator=generator), dim=-1)
    v = F.normalize(torch.randn(1, pairs, 1, keys, generator=generator), dim=-1)
    _, whole = ek.ridge_memory(k, k, v)
    _, never = ek.ridge_memory(k[:, 1:], k[:, 1:], v[:, 1:])
    forgotten = ek.ridge_forget(whole, k[:, :1], v[:, :1])

    def readouts(state: ek.RidgeState) -> Tensor:
        silent = torch.zeros(k.shape[:3])  # β = 0 reads without a write
        return ek.ridge_memory(k, k, v, silent, initial_state=state)[0][0, :, 0]

    def cosine(state: ek.RidgeState, pair: int) -> float:
        return float(F.cosine_similarity(readouts(state)[pair], v[0, pair, 0], dim=0))

    return {
        "cosine of the pair before": cosine(whole, 0),
        "cosine of the pair after": cosine(forgotten, 0),
        "least cosine of the others after": min(cosine(forgotten, i) for i in range(1, pairs)),
        "readouts' distance to the memory that never saw it": float(
            (readouts(forgotten) - readouts(never)).norm() / readouts(never).norm()
        ),
        "state's distance": float((forgotten.cross - never.cross).norm() / never.cross.norm()),
    }
