"""Whether a prompt is about what the memory holds; if not, the bare decoder answers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import _checks as check
from .._io import new_file
from ..errors import EngramError
from ..hf.loading import load_model
from ..hf.tokens import open_ids
from ..memory.encoder import SentenceEncoder, load_encoder
from ..memory.episodic import EpisodicMemory
from ..memory.ledger import Id

FILE = "scope.json"


def key_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """The cosine of each query to the nearest stored key; −1 where nothing is stored.

    Args:
        queries: `[N, latent]`.
        keys: `[S, latent]`.

    Returns:
        `[N]`, from −1 to 1.
    """
    if not len(keys):
        return queries.new_full((len(queries),), -1.0)
    normalise = nn.functional.normalize
    return (normalise(queries, dim=-1) @ normalise(keys.to(queries), dim=-1).mT).amax(-1)


def stored_keys(memory: EpisodicMemory) -> Tensor:
    """The keys in a memory's ledger, `[S, latent]`, of rows written with ids."""
    keys = [entry.key for _, entry in memory.ledger.items()]
    return torch.stack(keys) if keys else memory.cross.new_zeros(0, memory.latent)


class ScopeDetector:
    """A threshold on a score: at or above it a query is in scope.

    Args:
        threshold: of the scores, such as `key_scores`.

    Example:
        >>> detector = ScopeDetector.calibrate(key_scores(asked, keys), key_scores(others, keys))
        >>> detector(key_scores(queries, stored_keys(memory)))
        tensor([True, False])

    Source: Das et al. 2024 (arXiv 2403.11901), the scope detector.
    """

    def __init__(self, threshold: float):
        check.number("threshold", threshold)
        self.threshold = threshold

    def __call__(self, scores: Tensor) -> Tensor:
        """Which of the scores `[N]` are in scope, bool `[N]`."""
        return scores >= self.threshold

    @classmethod
    def calibrate(cls, inside: Tensor, outside: Tensor) -> ScopeDetector:
        """The threshold with the highest mean of the shares of either kind that it tells right.

        It lies midway between two scores, of equally good ones where they lie farthest apart.

        Args:
            inside: scores of queries about facts that were stored, `[N]`.
            outside: scores of queries about others, `[M]`.

        Raises:
            ValueError: no scores of a kind, or scores that are not finite.
        """
        for name, scores in (("inside", inside), ("outside", outside)):
            check.expect(scores.numel() > 0, name, "some scores", "none")
            check.finite(name, scores)
        scores = torch.cat([inside, outside]).double().unique()
        edges = torch.cat([scores[:1] - 1, scores, scores[-1:] + 1])
        middles = (edges[1:] + edges[:-1]) / 2
        right = (inside.double() >= middles[:, None]).double().mean(-1)
        right = right + (outside.double() < middles[:, None]).double().mean(-1)
        gaps = torch.where(right == right.max(), edges[1:] - edges[:-1], -1.0)
        return cls(float(middles[gaps.argmax()]))


class ScopedModel:
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

    def __init__(self, model, tokenizer, encoder: SentenceEncoder, detector: ScopeDetector):
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
            ValueError: numbers of prompts, targets and ids that differ.
            EngramError: an id that is taken; nothing is written then.
        """
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
    def answer(self, prompts: Sequence[str], max_new_tokens: int = 12, **options) -> list[str]:
        """Write prompts on: those in scope from memory, the others by the bare decoder.

        Args:
            prompts: what is asked.
            max_new_tokens: of an answer.
            **options: of transformers' `generate`; greedy by default.

        Returns:
            What follows each prompt.
        """
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

    def generate(self, prompts: Sequence[str], readouts: Tensor | None, **options) -> Tensor:
        """Write prompts on by given readouts, whatever their scope.

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

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write the model's folder, and the threshold into it."""
        self.model.save_pretrained(directory)
        with new_file(Path(directory) / FILE) as path:
            path.write_text(json.dumps({"threshold": self.detector.threshold}) + "\n")

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> ScopedModel:
        """Read what `save_pretrained` wrote; encoder and decoder must have names, which tokenizers come with.

        Raises:
            EngramError: the folder is incomplete or damaged, or its bases have no names.
        """
        from .model import LarimarConfig, LarimarModel

        try:
            threshold = json.loads((Path(directory) / FILE).read_text())["threshold"]
            settings = json.loads((Path(directory) / "config.json").read_text())
            config = LarimarConfig(**settings)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EngramError(
                f"directory: expected what save_pretrained wrote, got {str(directory)!r} ({error})"
            ) from error
        if config.encoder_name is None or config.decoder_name is None:
            raise EngramError(f"directory: expected bases with names, got none in {str(directory)!r}")
        encoder = load_encoder(config.encoder_name)
        decoder, tokenizer = load_model(config.decoder_name)
        model = LarimarModel.from_pretrained(directory, encoder=encoder.model, decoder=decoder)
        return cls(model, tokenizer, encoder, ScopeDetector(threshold))

    def _scope(self, queries: Tensor) -> Tensor:
        return self.detector(key_scores(queries, stored_keys(self.model.memory)))

    def _texts(self, written: Tensor) -> list[str]:
        return self.tokenizer.batch_decode(written, skip_special_tokens=True)

    def _padding(self) -> int:
        """What follows the end of a shorter text of a batch: a token that is left out of texts."""
        given = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in given if token is not None), 0)
