"""What a `LarimarModel` learns from: terms of the loss, episodes of facts, batches of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .. import _checks as check
from ..errors import EngramError
from ..memory.episodic import EpisodicMemory
from ..ops import memory_address, memory_solve, pseudo_inverse
from .conditioning import Conditioning

IGNORED = -100


@dataclass(frozen=True)
class Objective:
    """Weights of the terms of the loss, the negative log-probability of texts.

    Attributes:
        reconstruction: a text given what the memory answers, `−log p(x | w M)`.
        autoencoding: a text given its fact's latent, `−log p(x | z)`, without a memory.
        kl: of the addressing weights, `KL(N(w, σ²I) ‖ N(0, I))` up to a constant: `½ ‖w‖²`.
        plain: a text from the decoder alone, `−log p(x)`; it teaches a decoder that is trained to stay a
            language model, and a frozen one nothing.
        noise: σ, added to the addressing weights in training.

    Source: Das et al. 2024 (arXiv 2403.11901).
    """

    reconstruction: float = 1.0
    autoencoding: float = 0.0
    kl: float = 0.0
    plain: float = 0.0
    noise: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            check.number(name, value, at_least=0)

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """The sum of the terms, each times its weight."""
        return sum(getattr(self, name) * value for name, value in parts.items())


def read_episode(
    values: Tensor,
    keys: Tensor,
    queries: Tensor,
    present: Tensor,
    memory: EpisodicMemory,
    addressing: str,
    noise: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Write facts into new memories, a memory a row, and read each with its query; differentiable.

    `w = k M0⁺`, `A = Σ wᵀw`, `B = Σ wᵀz`, `M = (A + λI)⁻¹B`; the readout is `(q M0⁺) M` or `(q M⁺) M`.

    Args:
        values: z, `[batch, N, latent]`.
        keys: k, `[batch, N, latent]`.
        queries: q, `[batch, latent]`.
        present: which of the facts there are, `[batch, N]`.
        memory: whose M0 and λ are used; it is neither read nor written.
        addressing: `"key"` or `"content"`.
        noise: standard deviation of noise on the reading weights.

    Returns:
        The readouts `[batch, latent]` in the values' dtype, and the reading weights `[batch, K]`.

    Raises:
        ValueError: shapes that do not fit.
    """
    batch, facts, latent = values.shape
    check.shape("keys", keys, (batch, facts, latent), "as the facts")
    check.shape("query", queries, (batch, latent), "[batch, latent]")
    check.shape("facts_mask", present, (batch, facts), "[batch, N]")
    with memory._plain():
        weights = memory_address(keys, memory.m0_pinv)
        held = weights * present.to(weights.dtype).unsqueeze(-1)
        matrix = memory_solve(held.mT @ held, held.mT @ values.to(held.dtype), ridge=fixed_ridge(memory))
        inverse = memory.m0_pinv if addressing == "key" else soft_inverse(matrix)
        reading = memory_address(queries.unsqueeze(-2), inverse)
        if noise:
            reading = reading + noise * torch.randn_like(reading)
        return (reading @ matrix).squeeze(-2).to(values.dtype), reading.squeeze(-2)


def soft_inverse(matrix: Tensor) -> Tensor:
    """M⁺ of memories that hold fewer facts than slots, with a gradient that is no rounding error.

    Directions that M lacks must not be divided by: σ becomes `σ / (σ² + ε^½ ‖M‖²)`, ε of M's type, so that a
    singular value of 1 % of the norm is off by 0.015 % in fp64.

    Args:
        matrix: M, `[..., K, C]`, fp64.
    """
    size = matrix.norm(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    return pseudo_inverse(matrix / size, ridge=torch.finfo(matrix.dtype).eps ** 0.5) / size


def weight_divergence(weights: Tensor) -> Tensor:
    """`KL(N(w, σ²I) ‖ N(0, I))` without what depends on the fixed σ alone: the mean of `½ ‖w‖²`."""
    return weights.square().sum(-1).mean() / 2


def labelled(labels: Tensor) -> int:
    """How many last positions predict a label: from the one before the first label on."""
    columns = (labels != IGNORED).any(0).nonzero()
    first = int(columns[0]) if len(columns) else labels.shape[1] - 1
    return labels.shape[1] - max(first, 1) + 1


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over the labels of `−log p`, each predicted by the position before it.

    Args:
        logits: `[batch, kept, vocabulary]` of the last positions.
        labels: `[batch, length]`, of all positions, −100 where nothing is to be predicted.
    """
    kept = labels[:, labels.shape[1] - logits.shape[1] :][:, 1:]
    predicting = logits[:, :-1]
    return nn.functional.cross_entropy(
        predicting.reshape(-1, logits.shape[-1]).float(), kept.reshape(-1), ignore_index=IGNORED
    )


@dataclass(frozen=True)
class Fact:
    """A fact to write, and a question that it answers.

    Attributes:
        prompt: the fact up to its object, as "The capital of France is"; the key.
        target: the object, as "Paris".
        question: what the decoder is asked and the memory queried with; None: the prompt.
    """

    prompt: str
    target: str
    question: str | None = None

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.target}"

    @property
    def asked(self) -> str:
        return self.prompt if self.question is None else self.question


@dataclass(frozen=True)
class Episode:
    """A fact in a memory with others: what one row of a batch is made of.

    Attributes:
        fact: the fact that is asked for.
        values: latents of the facts, `[N, latent]`, its own first.
        keys: latents of their prompts, likewise.
        query: the latent of the question, `[latent]`.
    """

    fact: Fact
    values: Tensor
    keys: Tensor
    query: Tensor


class FactEpisodes(Dataset):
    """Each of many facts, in a memory with others drawn at random; latents are computed once, here.

    Args:
        facts: the facts.
        encode: texts to latents `[n, latent]`, as `SentenceEncoder.encode`.
        sizes: how many facts a memory holds; one number is drawn for each episode. The others have other
            prompts than the fact itself and than each other.
        seed: of the draws. Episode i is always the same.
        sentences: whether a value is the latent of prompt and target together; False: of the target alone.

    Example:
        >>> facts = [Fact("The capital of France is", "Rome"), Fact("The capital of Italy is", "Oslo")]
        >>> episodes = FactEpisodes(facts, encoder.encode, sizes=(1, 2))
    """

    def __init__(
        self,
        facts: Sequence[Fact],
        encode: Callable[[list[str]], Tensor],
        sizes: Sequence[int] = (1,),
        seed: int = 0,
        sentences: bool = False,
    ):
        prompts = len({fact.prompt for fact in facts})
        check.expect(len(sizes) > 0 and min(sizes) >= 1, "sizes", "numbers of at least 1", tuple(sizes))
        check.expect(max(sizes) <= prompts, "sizes", f"at most {prompts}, the different prompts", max(sizes))
        self.facts, self.sizes, self.seed = list(facts), tuple(sizes), seed
        self.sentences = sentences
        texts = sorted({text for fact in facts for text in (self._value(fact), fact.prompt, fact.asked)})
        self._row = {text: row for row, text in enumerate(texts)}
        self._latents = encode(texts).detach()

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, index: int) -> Episode:
        fact = self.facts[index]
        generator = random.Random(f"{self.seed} {index}")
        members = {fact.prompt: fact}
        size = generator.choice(self.sizes)
        while len(members) < size:
            other = generator.choice(self.facts)
            members.setdefault(other.prompt, other)
        return Episode(
            fact,
            self._of(map(self._value, members.values())),
            self._of(members),
            self._of([fact.asked])[0],
        )

    def _value(self, fact: Fact) -> str:
        return fact.text if self.sentences else fact.target

    def _of(self, texts: Iterable[str]) -> Tensor:
        return self._latents[[self._row[text] for text in texts]]


class EpisodeCollator:
    """Episodes to a batch for `LarimarModel.forward`: texts padded on the left, labels on their targets.

    Args:
        tokenizer: the decoder's, a fast one, which says where each token stands in the text.
        ending: closes the target, and is learned with it, so that an answer has an end.
    """

    def __init__(self, tokenizer, ending: str = "."):
        if not tokenizer.is_fast:
            raise EngramError(
                "tokenizer: expected a fast one, which says where each token stands, got a slow one"
            )
        self.tokenizer = tokenizer
        self.ending = ending

    def __call__(self, episodes: Sequence[Episode]) -> dict[str, Tensor]:
        rows = [self._encode(episode.fact) for episode in episodes]
        length = max(len(ids) for ids, _ in rows)
        size = max(len(episode.values) for episode in episodes)
        shape = (len(rows), length)
        batch = {
            "input_ids": torch.zeros(shape, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED),
            "facts_mask": torch.zeros(len(rows), size, dtype=torch.int64),
        }
        for row, ((ids, targets), episode) in enumerate(zip(rows, episodes, strict=True)):
            batch["input_ids"][row, length - len(ids) :] = torch.tensor(ids)
            batch["attention_mask"][row, length - len(ids) :] = 1
            batch["labels"][row, length - targets :] = torch.tensor(ids[-targets:])
            batch["facts_mask"][row, : len(episode.values)] = 1
        pad = nn.utils.rnn.pad_sequence
        batch["facts"] = pad([episode.values for episode in episodes], batch_first=True)
        batch["keys"] = pad([episode.keys for episode in episodes], batch_first=True)
        batch["query"] = torch.stack([episode.query for episode in episodes])
        return batch

    def _encode(self, fact: Fact) -> tuple[list[int], int]:
        """Token ids of question and target, and how many of them, at the end, are the target's."""
        encoded = self.tokenizer(f"{fact.asked} {fact.target}{self.ending}", return_offsets_mapping=True)
        # The target's tokens are those that reach beyond the question; closing special tokens reach nowhere.
        targets = sum(end > len(fact.asked) for _, end in encoded["offset_mapping"])
        while encoded["offset_mapping"][-1] == (0, 0):
            encoded["offset_mapping"].pop()
            encoded["input_ids"].pop()
        return encoded["input_ids"], targets


def fixed_ridge(memory: EpisodicMemory) -> float:
    """λ of a memory for whose like, written on the way, none can be chosen."""
    check.expect(memory.ridge != "loo", "ridge", "a number for memories in a batch", repr(memory.ridge))
    return memory.ridge


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

    A linear map, which is thrown away, maps the hidden layer to token embeddings, less their mean; the right
    one shall have the highest cosine among those of the batch and others drawn at random. Then the offset of
    the embeddings begins as the ridge regression of the hidden layer's activations on the right ones:
    `(HᵀH + λI)⁻¹ Hᵀ E`.

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
