"""What a `LarimarModel` learns from: facts, episodes of a fact among others, batches of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .. import _checks as check
from ..errors import EngramError
from .objective import IGNORED

if TYPE_CHECKING:
    from ..hf.tokens import Tokenizer


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
        """The fact in one sentence, which is what is written."""
        return f"{self.prompt} {self.target}"

    @property
    def asked(self) -> str:
        """The question, or the prompt where there is none."""
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

    def __repr__(self) -> str:
        return f"FactEpisodes({len(self):,} facts, sizes={self.sizes}, seed={self.seed})"

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

    def __init__(self, tokenizer: Tokenizer, ending: str = "."):
        if not tokenizer.is_fast:
            raise EngramError(
                "tokenizer: expected a fast one, which says where each token stands, got a slow one"
            )
        self.tokenizer = tokenizer
        self.ending = ending

    def __repr__(self) -> str:
        return f"EpisodeCollator({type(self.tokenizer).__name__}, ending={self.ending!r})"

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
