"""How fluently a model writes: text sampled after prompts, and the entropy of its n-grams."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import torch

from ..hf.generation import sample
from ..hf.tokens import context_length, open_ids
from .answers import check_room
from .cases import Case

TOP_K = 5


def ngram_entropy(text: str) -> float:
    """The weighted mean of the entropies of a text's bi- and trigrams in bits, `(2/3 H₂ + 4/3 H₃) / 2`.

    Words and punctuation marks count; little repetition gives much. Papers print a hundredfold of it.

    Source: Meng et al. 2022 (arXiv 2202.05262), "generation entropy", and Zhang et al. 2018 (1809.05972).
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    return (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2


def fluency(
    model, tokenizer, cases: Sequence[Case], tokens: int, seed: int = 0, batch_size: int = 32
) -> list[float]:
    """The mean n-gram entropy of the texts that the model writes, for each case.

    They continue the case's generation prompts, or its own prompt where it has none.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        cases: whose prompts to continue.
        tokens: how many to write after each prompt.
        seed: of the sampling; a prompt's text depends neither on the other prompts nor on the batch.
        batch_size: texts a batch.

    Raises:
        EngramError: a text would be longer than the model's context.
    """
    prompts = [case.generation or (case.prompt,) for case in cases]
    flat = list(dict.fromkeys(prompt for group in prompts for prompt in group))
    texts = dict(zip(flat, generate(model, tokenizer, flat, tokens, seed, batch_size), strict=True))
    return [fmean(ngram_entropy(texts[prompt]) for prompt in group) for group in prompts]


def generate(
    model, tokenizer, prompts: Sequence[str], tokens: int, seed: int = 0, batch_size: int = 32
) -> list[str]:
    """Continue each prompt by `tokens` tokens, each drawn from the five likeliest."""
    encoded = [open_ids(tokenizer, prompt) for prompt in prompts]
    limit = context_length(model)
    for prompt, ids in zip(prompts, encoded, strict=True):
        check_room(limit, prompt, ids, tokens)
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    texts = [""] * len(prompts)
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        # Seeded by prompt: it draws alike before and after an edit, and in any company.
        draws = [random.Random(f"{seed} {prompts[i]}") for i in batch]

        def choose(numbers: list[int], logits: torch.Tensor, draws=draws) -> list[int]:
            top = logits.cpu().topk(min(TOP_K, logits.shape[-1]))
            reached = top.values.softmax(-1).cumsum(-1)[:, :-1]
            drawn = reached.new_tensor([[draws[number].random()] for number in numbers], dtype=torch.float64)
            return top.indices.gather(1, (reached < drawn).sum(1, keepdim=True)).flatten().tolist()

        rows = sample(model, [encoded[i] for i in batch], [tokens] * len(batch), choose)
        for i, row in zip(batch, rows, strict=True):
            texts[i] = tokenizer.decode(row, skip_special_tokens=True)
    return texts


def _entropy(words: list[str], n: int) -> float:
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())
