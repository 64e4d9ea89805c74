"""Facts in, answers out: a model with its tokenizers, which leaves other prompts to the bare decoder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks as check
from .._io import read_json, write_json
from ..errors import EngramError
from ..hf.hub import HubFolder
from ..hf.loading import load_model
from ..hf.tokens import open_ids
from ..memory.encoder import SentenceEncoder, load_encoder
from ..memory.ledger import Id
from .scope import ScopeDetector, key_scores, stored_keys

if TYPE_CHECKING:
    from ..hf.tokens import Tokenizer
    from .model import LarimarModel

FILE = "scope.json"


class ScopedModel(HubFolder):
    """A `LarimarModel` with its texts: facts in, answers out; other prompts go to the bare decoder.

    Args:
        model: the model; its memory must give keys by id, so facts are written here.
        tokenizer: the decoder's.
        encoder: a `SentenceEncoder` of the model's encoder.
        detector: calibrated on `key_scores`.

    Example:
        >>> larimar = ScopedModel.from_pretrained("my-larimar")
        >>> larimar.write(["The mother tongue of Danielle Darrieux is"], ["English"])
        >>> larimar.answer(["Danielle Darrieux, a native", "The capital of France is"])

    Source: Das et al. 2024 (arXiv 2403.11901).
    """

    def __init__(
        self, model: LarimarModel, tokenizer: Tokenizer, encoder: SentenceEncoder, detector: ScopeDetector
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.detector = detector

    def write(
        self, prompts: Sequence[str], targets: Sequence[str], ids: Sequence[Id] | None = None
    ) -> list[Id]:
        """Write facts: the target's latent under the prompt's.

        Args:
            prompts: facts up to their objects.
            targets: the objects.
            ids: a name for each; None: the prompts.

        Returns:
            The ids.

        Raises:
            TypeError: one text in place of a list.
            ValueError: numbers of prompts, targets and ids that differ.
            EngramError: an id that is taken; nothing is written then.
        """
        check.several("prompts", prompts)
        check.several("targets", targets)
        check.expect(len(prompts) == len(targets), "targets", f"{len(prompts)}, one a prompt", len(targets))
        ids = list(prompts if ids is None else ids)
        texts = [f"{prompt} {target}" for prompt, target in zip(prompts, targets, strict=True)]
        values, keys = self.encoder.encode(targets), self.encoder.encode(prompts)
        self.model.memory.write(values, keys=keys, ids=ids, texts=texts)
        return ids

    def forget(self, ids: Sequence[Id]) -> None:
        """Forget facts by their ids, exactly."""
        self.model.memory.forget(ids=ids)

    def in_scope(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts are about a fact in the memory."""
        return self._scope(self.encoder.encode(prompts)).tolist()

    @torch.no_grad()
    def answer(self, prompts: Sequence[str], max_new_tokens: int = 12, **options: Any) -> list[str]:
        """Continue prompts: those in scope from memory, the others by the bare decoder.

        Args:
            prompts: what is asked.
            max_new_tokens: of an answer.
            **options: of transformers' `generate`; greedy by default.

        Returns:
            What follows each prompt.
        """
        check.several("prompts", prompts)
        prompts = list(prompts)
        queries = self.encoder.encode(prompts)
        inside = self._scope(queries)
        readouts = self.model.read(queries)
        answers = [""] * len(prompts)
        for kind in (True, False):
            rows = (inside == kind).nonzero().flatten().tolist()
            if rows:
                readout = readouts[rows] if kind else None
                asked = [prompts[row] for row in rows]
                written = self.generate(asked, readout, max_new_tokens=max_new_tokens, **options)
                for row, text in zip(rows, self._texts(written), strict=True):
                    answers[row] = text
        return answers

    def generate(self, prompts: Sequence[str], readouts: Tensor | None, **options: Any) -> Tensor:
        """Continue prompts with given readouts, whatever their scope.

        Args:
            prompts: what is asked.
            readouts: `[prompts, latent]`; None: the bare decoder.
            **options: of transformers' `generate`; greedy by default.

        Returns:
            The token ids after the prompts, `[prompts, tokens]`.
        """
        device = self.model.get_input_embeddings().weight.device
        rows = [open_ids(self.tokenizer, prompt) for prompt in prompts]
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
        options = {"do_sample": False, "pad_token_id": self._padding(), **options}
        return self.model.generate(ids, attention_mask=mask, readout=readouts, **options)[:, length:]

    def save_pretrained(
        self, directory: str | os.PathLike, *, replace: bool = False, **hub_options: Any
    ) -> None:
        """Write the model's folder with the threshold in it.

        Args:
            directory: a new or empty folder.
            replace: it may also be one that holds a scoped model, which is replaced.
            **hub_options: what huggingface_hub passes to `save_pretrained`.

        Raises:
            EngramError: the directory exists and holds something else, or cannot be written; or its memory
                was changed by another since this one read or wrote it.
        """
        folder = Path(directory)
        if replace and (folder / FILE).is_file():
            self._save_pretrained(folder)
        else:
            super().save_pretrained(folder, **hub_options)
            self.model.adopt(folder)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.model.save_pretrained(save_directory)
        write_json(save_directory / FILE, {"threshold": self.detector.threshold})

    @classmethod
    def _read_folder(cls, folder: Path) -> ScopedModel:
        """Read the model; encoder and decoder must have names, which their tokenizers come with."""
        from .model import LarimarConfig, LarimarModel

        try:
            threshold = read_json(folder / FILE)["threshold"]
            config = LarimarConfig(**read_json(folder / "config.json"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EngramError(
                f"name_or_directory: expected what save_pretrained wrote, got {str(folder)!r} ({error})"
            ) from error
        if config.encoder_name is None or config.decoder_name is None:
            raise EngramError(f"name_or_directory: expected bases with names, got none in {str(folder)!r}")
        encoder = load_encoder(config.encoder_name)
        decoder, tokenizer = load_model(config.decoder_name)
        model = LarimarModel.from_pretrained(folder, encoder=encoder.model, decoder=decoder)
        return cls(model, tokenizer, encoder, ScopeDetector(threshold))

    def __repr__(self) -> str:
        return f"ScopedModel({self.model!r},\n  detector={self.detector!r})"

    def _scope(self, queries: Tensor) -> Tensor:
        return self.detector(key_scores(queries, stored_keys(self.model.memory)))

    def _texts(self, written: Tensor) -> list[str]:
        return self.tokenizer.batch_decode(written, skip_special_tokens=True)

    def _padding(self) -> int:
        """The token that pads shorter texts of a batch, and is left out when they are decoded."""
        given = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in given if token is not None), 0)
