"""Tasks that a language model answers by one word after a prompt."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..hf.tokens import open_ids, pad_rows

if TYPE_CHECKING:
    from ..hf.tokens import Tokenizer

# Settings of models that change the head's output: Granite's, Cohere's, Gemma's.
AFTER_THE_HEAD = ("logits_scaling", "logit_scale", "final_logit_softcapping")


def by_length(rows: list, size: int, seed: int | None, length: Callable[[Any], int]) -> list[list]:
    """Cut rows into groups of like length, in an order drawn by a seed; without one, from short to long."""
    rows, generator = list(rows), random.Random(seed)
    if seed is not None:
        generator.shuffle(rows)
    rows.sort(key=length)
    groups = [rows[at : at + size] for at in range(0, len(rows), size)]
    if seed is not None:
        generator.shuffle(groups)
    return groups


def padded(group: list[list[int]]) -> dict[str, Tensor]:
    """Token lists as input_ids and attention_mask [rows, longest], padded with 0 on the right."""
    ids, mask = pad_rows(group)
    return {"input_ids": ids, "attention_mask": mask}


class PromptTask:
    """Classification by the next word: a template with `{}` for the text, and one word for each label.

    Args:
        tokenizer: a Hugging Face tokenizer.
        template: such as "Review: {} Sentiment: It was".
        words: such as [" terrible", " great"], each one token, all different.
        max_length: tokens of a prompt; longer texts lose their end, never the template.

    Raises:
        ValueError: a template without `{}`, or words that are not one token each, or equal.

    Example:
        >>> task = PromptTask(tokenizer, "Review: {} Sentiment: It was", [" terrible", " great"])
        >>> graft = localize(base, tuned, task.batches(rows, 16), loss_fn=task.loss)
    """

    def __init__(self, tokenizer: Tokenizer, template: str, words: Sequence[str], max_length: int = 256):
        if template.count("{}") != 1:
            raise ValueError(f"template: expected one {{}} for the text, got {template!r}")
        tokens = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        for word, ids in zip(words, tokens, strict=True):
            if len(ids) != 1:
                raise ValueError(f"words: expected words of one token, got {word!r} with {len(ids)}")
        if len(words) < 2 or len({ids[0] for ids in tokens}) < len(words):
            raise ValueError(f"words: expected two or more different tokens, got {list(words)!r}")
        self.tokenizer, self.template, self.words, self.max_length = (
            tokenizer,
            template,
            list(words),
            max_length,
        )
        self.tokens = torch.tensor([ids[0] for ids in tokens])

    def batches(self, rows: Sequence[tuple[int, str]], size: int, seed: int | None = None) -> list[dict]:
        """Cut (label, text) rows into batches of prompts of like length.

        Args:
            rows: label, from 0 to the number of words less one, and text.
            size: rows a batch.
            seed: shuffles rows and batches. Default: batches from short to long.

        Returns:
            Mappings of input_ids and attention_mask [size, longest], padded on the right, and labels [size].
        """
        wrong = [label for label, _ in rows if not 0 <= label < len(self.words)]
        if wrong:
            raise ValueError(f"rows: expected labels from 0 to {len(self.words) - 1}, got {wrong[0]}")
        encoded = [(label, self._encode(text)) for label, text in rows]
        groups = by_length(encoded, size, seed, lambda row: len(row[1]))
        return [
            {**padded([ids for _, ids in group]), "labels": torch.tensor([label for label, _ in group])}
            for group in groups
        ]

    def _encode(self, text: str) -> list[int]:
        ids = open_ids(self.tokenizer, self.template.replace("{}", text))
        while len(ids) > self.max_length and text:
            text = text[: len(text) - max(1, len(text) * (len(ids) - self.max_length) // len(ids))]
            ids = open_ids(self.tokenizer, self.template.replace("{}", text))
        return ids

    def logits(self, model: Any, batch: dict) -> Tensor:
        """The logits of the words after each prompt, [batch, labels].

        Where nothing follows the head, only these rows of it are computed.
        """
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        last = batch["attention_mask"].sum(-1) - 1
        row = torch.arange(len(last), device=last.device)
        tokens = self.tokens.to(last.device)
        head = model.get_output_embeddings()
        if head is None or any(getattr(model.config, name, None) is not None for name in AFTER_THE_HEAD):
            return model(**inputs, use_cache=False).logits[row, last][:, tokens]
        hidden = model.base_model(**inputs, use_cache=False)[0][row, last]
        bias = None if head.bias is None else head.bias[tokens]
        return nn.functional.linear(hidden, head.weight[tokens], bias)

    def loss(self, model: nn.Module, batch: dict) -> Tensor:
        """The mean cross-entropy of the labels' words among all words."""
        return nn.functional.cross_entropy(self.logits(model, batch).float(), batch["labels"])

    def __repr__(self) -> str:
        return f"PromptTask({self.template!r}, {self.words})"
