"""Values that are a decoder's own token embeddings: nothing is trained, and a readout is words again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .. import _checks as check
from ..hf.chat import chat_ids
from ..hf.generation import greedy
from ..hf.tokens import open_ids
from ..memory.encoder import SentenceEncoder, warn_of_another
from ..memory.episodic import EpisodicMemory
from ..ops import memory_address

if TYPE_CHECKING:
    from ..hf.tokens import Tokenizer

# Readouts that are compared with the vocabulary at a time.
_BLOCK = 512


def row_weights(memory: EpisodicMemory, queries: Tensor) -> Tensor:
    """What a memory's readout of queries consists of: the weight of each row of its ledger.

        c = (q M₀⁺) (A + λI)⁻¹ (K M₀⁺)ᵀ,   so that   c Z = (q M₀⁺) M

    `Z` are the values that were written; others may take their place, of any size.

    Args:
        memory: a single one, all of whose rows were written with ids.
        queries: `[N, latent]`.

    Returns:
        `[N, rows]`, in the memory's `state_dtype`, the rows in the order of the ledger.

    Raises:
        ValueError: a batch of memories, or rows without ids.
    """
    check.expect(memory.batch == 1, "memory", "a single one", f"{memory.batch} of them")
    keys = [entry.key for _, entry in memory.ledger.items()]
    rows = sum(map(len, keys))
    check.expect(
        len(memory) == rows, "memory", "one all of whose rows have ids", f"{len(memory) - rows} without"
    )
    to_slots = memory.m0_pinv.reshape(memory.latent, memory.slots)
    asked = memory_address(queries.to(to_slots), to_slots)
    if not rows:
        return asked.new_zeros(len(asked), 0)
    written = memory_address(torch.cat(keys).to(to_slots), to_slots)
    return asked @ torch.linalg.solve(memory.precision()[0], written.mT)


class TokenValues:
    """Texts as the embeddings of their tokens in a decoder, and readouts as texts.

        v = (E[t₁] − Ē, …, E[tₘ] − Ē),   t̂ᵢ = argmaxₜ cos(v̂ᵢ, E[t] − Ē)

    Ē is the mean embedding. A readout is a mixture of what was written; embeddings of different tokens are
    nearly orthogonal, so the nearest token is the one of the heaviest row as long as no others outweigh it.

    Args:
        decoder: a causal language model.
        tokenizer: the decoder's.
        slots: m, tokens of a text; what is longer loses its end.

    Example:
        >>> values = TokenValues(*load_model("smollm2"))
        >>> values.decode(row_weights(memory, queries) @ values.encode(texts))
        ['English']
    """

    def __init__(self, decoder: nn.Module, tokenizer: Tokenizer, slots: int = 6):
        check.integer("slots", slots, at_least=1)
        self.tokenizer = tokenizer
        self.slots = slots
        embeddings = decoder.get_input_embeddings().weight.detach().float()
        self._centred = embeddings - embeddings.mean(0)
        self._directions = normalize(self._centred, dim=-1)
        end = tokenizer.eos_token_id
        self._end = 0 if end is None else end

    def __repr__(self) -> str:
        return f"TokenValues(slots={self.slots}, size={self.size})"

    @property
    def size(self) -> int:
        """Numbers that a text's value has."""
        return self.slots * self._centred.shape[1]

    def encode(self, texts: Sequence[str]) -> Tensor:
        """The values of texts, `[N, slots · embedding]`, fp32."""
        check.several("texts", texts)
        ids = [self.tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in texts]
        rows = [(row + [self._end] * self.slots)[: self.slots] for row in ids]
        return self._centred[torch.tensor(rows, dtype=torch.int64).reshape(-1, self.slots)].flatten(1)

    def decode(self, readouts: Tensor) -> list[str]:
        """The texts that are nearest to readouts `[N, slots · embedding]`, token by token."""
        check.shape("readouts", readouts, (len(readouts), self.size), "[N, slots · embedding]")
        texts = []
        for block in readouts.to(self._directions).split(_BLOCK):
            states = block.view(len(block) * self.slots, -1)
            ids = (states @ self._directions.mT).argmax(-1).view(-1, self.slots)
            # A readout of nothing has no direction.
            ids = ids.masked_fill((states.norm(dim=-1) == 0).view_as(ids), self._end)
            for row in ids.tolist():
                row = row[: row.index(self._end)] if self._end in row else row
                texts.append(self.tokenizer.decode(row).strip())
        return texts


class ReadAloud:
    """A decoder that continues prompts with what a memory reads, without any training.

    The memory gives each of its rows a weight, the values are `TokenValues` of the rows' texts, and the words
    that are nearest to the readout stand before the decoder as something to repeat: the prompt, and they.

    Args:
        memory: single, written with ids; its texts are what follows the prompts, such as objects.
        encoder: what made its keys.
        decoder: a causal language model that was taught to converse.
        tokenizer: the decoder's.
        slots: tokens of a text.

    Example:
        >>> prompts, objects = ["The mother tongue of Danielle Darrieux is"], ["English"]
        >>> memory.write(encoder.encode(objects), keys=encoder.encode(prompts), ids=prompts, texts=objects)
        >>> ReadAloud(memory, encoder, decoder, tokenizer).answer(prompts)
        ['English']

    Not run on a GPU.
    """

    def __init__(
        self,
        memory: EpisodicMemory,
        encoder: SentenceEncoder,
        decoder: nn.Module,
        tokenizer: Tokenizer,
        slots: int = 6,
    ):
        warn_of_another(encoder, memory.encoder)
        self.memory = memory
        self.encoder = encoder
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.values = TokenValues(decoder, tokenizer, slots)

    def __repr__(self) -> str:
        return f"ReadAloud({len(self.memory)} rows, {type(self.decoder).__name__}, {self.values!r})"

    @torch.no_grad()
    def read(self, prompts: Sequence[str]) -> list[str]:
        """The words that the memory holds for prompts; empty from an empty memory."""
        check.several("prompts", prompts)
        prompts = list(prompts)
        if not len(self.memory) or not prompts:
            return [""] * len(prompts)
        weights = row_weights(self.memory, self.encoder.encode(prompts).to(self.memory.gram.device))
        texts = [entry.text or "" for _, entry in self.memory.ledger.items() for _ in entry.key]
        values = self.values.encode(texts)
        return self.values.decode(weights.to(values) @ values)

    def answer(self, prompts: Sequence[str], max_new_tokens: int = 12) -> list[str]:
        """Continue prompts with what the memory holds for them, up to the next punctuation.

        Args:
            prompts: what is asked, as beginnings of sentences.
            max_new_tokens: of an answer.
        """
        return self.say(prompts, self.read(prompts), max_new_tokens)

    def say(self, prompts: Sequence[str], words: Sequence[str], max_new_tokens: int = 12) -> list[str]:
        """Continue prompts with given words before the decoder; where they are empty, by itself."""
        rows = [
            self._row(" ".join(prompt.split()), text) for prompt, text in zip(prompts, words, strict=True)
        ]
        return self.written(rows, max_new_tokens) if rows else []

    def written(self, rows: Sequence[list[int]], max_new_tokens: int) -> list[str]:
        """What the decoder writes after rows of tokens, up to the next punctuation."""
        closing = set(self.tokenizer.all_special_ids)

        def ends(written: list[int]) -> bool:
            return written[-1] in closing or _cut(self._text(written)) is not None

        texts = [self._text(tokens) for tokens in greedy(self.decoder, rows, max_new_tokens, ends)]
        return [text.strip() if (cut := _cut(text)) is None else cut for text in texts]

    def _row(self, prompt: str, words: str) -> list[int]:
        if not words:
            return open_ids(self.tokenizer, prompt)
        asked = chat_ids(self.tokenizer, [{"role": "user", "content": f"Repeat: {prompt} {words}."}])
        return asked + list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def _cut(text: str) -> str | None:
    """A text up to its first punctuation that ends an object; None where it has none."""
    ends = [at for at in map(text.find, ".,;:!?\n") if at > 0]
    return text[: min(ends)].strip() if ends else None
