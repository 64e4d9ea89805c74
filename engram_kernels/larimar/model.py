"""A language model with an episodic memory: encoder → memory → conditioned decoder (Larimar)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..errors import EngramError
from ..hf.cache import generation_cache, output_cache
from ..hf.hub import HubFolder
from ..hf.loading import load_model, writable_directory
from ..hf.modeling import (
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    ModelOutput,
    PreTrainedModel,
)
from ..hf.pooling import pooled
from ..memory.encoder import load_encoder
from ..memory.episodic import EpisodicMemory
from . import files
from .conditioning import Conditioning, first_token
from .config import LarimarConfig, configuration_of
from .decoding import check_readout, decode
from .objective import Objective, cross_entropy, labelled, weight_divergence
from .reading import read_episode


@dataclass
class LarimarOutput(ModelOutput):
    """What `LarimarModel` returns.

    Attributes:
        loss: the sum of `parts`, each times its weight, of the bare decoder `parts["plain"]`; None without
            labels.
        logits: `[batch, length, vocabulary]`, or of the last positions: see `LarimarModel.forward`.
        parts: the terms of the loss by name, unweighted.
        readout: what the decoder was conditioned on, `[batch, latent]`; None for the bare decoder.
        cache: the decoder's; its first entry is the pseudo-token.
        hidden_states: of the decoder, where asked for.
        attentions: likewise; the first column is the pseudo-token's.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    parts: dict[str, Tensor] | None = None
    readout: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class LarimarModel(HubFolder, PreTrainedModel, GenerationMixin):
    """An encoder of sentences, an episodic memory of their latents, and a decoder that sees what is read.

    The readout `[latent]` of a prompt becomes one pseudo-token, a key and a value in every layer, which is
    the first entry of the decoder's cache, at position 0 (the text begins at 1), and an offset of the token
    embeddings. Where the readout is None or zero there is neither, and the decoder is the bare one.

    Args:
        config: how it is put together.
        encoder: an encoder of transformers; None: a random one of `config.encoder`.
        decoder: a causal language model; None: a random one of `config.decoder`.

    Raises:
        EngramError: the decoder does not keep keys and values of one size of the whole past.

    Example:
        >>> model = LarimarModel.from_pretrained("my-larimar")
        >>> model.write(**fact_tokens, keys=prompt_tokens["input_ids"], ids=["a fact"])
        >>> readout = model.read(**prompt_tokens)
        >>> model.generate(prompt_ids, readout=readout, max_new_tokens=8)

    Source: Das et al. 2024 (arXiv 2403.11901). Not run on a GPU.
    """

    config_class = LarimarConfig
    main_input_name = "input_ids"
    # The loss is a mean over a batch's labels: the Trainer must average it over accumulated batches.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(
        self, config: LarimarConfig, encoder: nn.Module | None = None, decoder: nn.Module | None = None
    ):
        super().__init__(config)
        self.encoder = AutoModel.from_config(configuration_of(config.encoder)) if encoder is None else encoder
        if decoder is None:
            decoder = AutoModelForCausalLM.from_config(configuration_of(config.decoder))
        self.decoder = decoder
        latent, embeddings = self.encoder.config.hidden_size, decoder.get_input_embeddings().weight
        memory = EpisodicMemory(config.slots, latent, ridge=config.ridge, seed=config.seed)
        self.memory = memory.to(embeddings.device)
        bos = decoder.config.bos_token_id
        first = first_token(decoder, bos if isinstance(bos, int) else 0)
        conditioning = Conditioning(latent, first, embeddings.shape[-1], config.hidden)
        self.conditioning = conditioning.to(embeddings.device)
        self.objective = Objective()
        if decoder.can_generate():
            self.generation_config = decoder.generation_config
        self.encoder.requires_grad_(config.train_encoder)
        self.decoder.requires_grad_(config.train_decoder)
        self.post_init()

    @classmethod
    def from_bases(cls, encoder: str | nn.Module, decoder: str | nn.Module, **options: Any) -> LarimarModel:
        """Put together an encoder and a decoder, each a name, which is then not stored, or a model.

        Args:
            encoder: `"minilm"`, a Hub name or a folder, whose files may say its pooling; or an encoder of
                transformers.
            decoder: `"smollm2"`, a Hub name, a folder, or a causal language model.
            **options: of `LarimarConfig`.
        """
        names = {
            f"{kind}_name": base
            for kind, base in (("encoder", encoder), ("decoder", decoder))
            if isinstance(base, str)
        }
        if isinstance(encoder, str):
            loaded = load_encoder(encoder)
            encoder, options = loaded.model, {"pooling": loaded.pooling, **options}
        encoder, decoder = _bases(encoder, decoder)
        config = LarimarConfig(encoder.config.to_dict(), decoder.config.to_dict(), **names, **options)
        return cls(config, encoder, decoder)

    def init_weights(self) -> None:
        """Do nothing: the bases come with their weights, and the conditioning sets its own."""

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.get_output_embeddings()

    def train(self, mode: bool = True) -> LarimarModel:
        """Switch the mode of what is trained: dropout in a frozen base would only be noise."""
        super().train(mode)
        self.encoder.train(mode and self.config.train_encoder)
        self.decoder.train(mode and self.config.train_decoder)
        return self

    def encode(self, texts: Tensor, mask: Tensor | None = None) -> Tensor:
        """Latents of texts: the encoder's last hidden states, pooled as `config.pooling` says, of length 1.

        Args:
            texts: token ids `[..., length]` of the encoder's tokenizer, or latents `[..., latent]`, which are
                returned as they are.
            mask: `[..., length]`, 1 at tokens; None: all are.

        Returns:
            Latents `[..., latent]`; zero for a text without tokens.
        """
        if texts.is_floating_point():
            return texts
        mask = torch.ones_like(texts) if mask is None else mask
        length = texts.shape[-1]
        states = self.encoder(
            input_ids=texts.reshape(-1, length), attention_mask=mask.reshape(-1, length)
        ).last_hidden_state
        latents = pooled(states, mask.reshape(-1, length), self.config.pooling)
        latents = nn.functional.normalize(latents, dim=-1).to(states.dtype)
        return latents.view(*texts.shape[:-1], -1)

    @torch.no_grad()
    def write(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        keys: Tensor | None = None,
        keys_mask: Tensor | None = None,
        ids: list | None = None,
    ) -> None:
        """Write facts `[N, length]` (tokens, or latents) into `memory`, under their keys or themselves."""
        keys = None if keys is None else self.encode(keys, keys_mask)
        self.memory.write(self.encode(input_ids, attention_mask), keys=keys, ids=ids)

    @torch.no_grad()
    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What `memory` holds for queries `[N, length]` (tokens, or latents): readouts `[N, latent]`."""
        queries = self.encode(input_ids, attention_mask)
        return self.memory.read(queries, addressing=self.config.addressing)

    def forget(self, ids: list) -> None:
        """Forget what was written under these ids, exactly."""
        self.memory.forget(ids=ids)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        readout: Tensor | None = None,
        facts: Tensor | None = None,
        facts_mask: Tensor | None = None,
        keys: Tensor | None = None,
        keys_mask: Tensor | None = None,
        query: Tensor | None = None,
        query_mask: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> LarimarOutput:
        """Run the decoder on texts, conditioned on a readout, or on what is read from a memory of facts.

        With `facts`, each row has a memory of its own, which exists only in this call's graph: they are
        written, the query is read, and gradients flow through both. `memory` is neither read nor written.
        The terms of the loss and their weights are those of `objective`.

        Args:
            input_ids: `[batch, length]`; pad on the left.
            attention_mask: `[batch, length]`, with a cache `[batch, past + length]`; no pseudo-token.
            labels: `[batch, length]`, −100 where nothing is to be predicted; shifted here. With labels and
                `logits_to_keep=0` logits are computed from the position before the first label on only.
            readout: `[batch, latent]`; a row of zeros has none.
            facts: `[batch, N, length]` of the encoder's tokens, or latents `[batch, N, latent]`; the first is
                what the row's text tells.
            facts_mask: `[batch, N, length]`, with latents `[batch, N]`; a fact without ones is absent.
            keys: as facts: what they are written under; None: the facts themselves.
            keys_mask: `[batch, N, length]`.
            query: what is asked, `[batch, length]` of the encoder's tokens or `[batch, latent]`.
            query_mask: `[batch, length]`.
            cache: what this model returned of the tokens before; None: there are none.
            use_cache: whether to return it.
            logits_to_keep: compute logits at so many last positions; 0: at all.
            **kwargs: to the decoder, as `output_hidden_states`.

        Returns:
            Loss, logits, terms of the loss, readout, cache.

        Raises:
            ValueError: facts and readout, facts without a query, or shapes that do not fit.
        """
        parts: dict[str, Tensor] = {}
        values = None
        if facts is not None:
            check.expect(readout is None, "readout", "none beside facts", "both")
            check.expect(query is not None, "query", "what the facts are asked", "none")
            values = self.encode(facts, facts_mask)
            mask = values if facts_mask is None else facts_mask.reshape(*values.shape[:2], -1)
            readout, weights = read_episode(
                values,
                values if keys is None else self.encode(keys, keys_mask),
                self.encode(query, query_mask),
                mask.any(-1),
                self.memory,
                self.config.addressing,
                self.objective.noise if self.training else 0.0,
            )
            if self.objective.kl:
                parts["kl"] = weight_divergence(weights)
        keep = labelled(labels) if labels is not None and not logits_to_keep else logits_to_keep
        run = {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": keep}
        outputs = self._decode(readout, cache, use_cache, **run, **kwargs)
        loss = None
        if labels is not None:
            term = "plain" if readout is None else "reconstruction"
            parts[term] = cross_entropy(outputs.logits, labels)
            if values is not None and self.objective.autoencoding:
                logits = self._decode(values[:, 0], None, False, **run).logits
                parts["autoencoding"] = cross_entropy(logits, labels)
            if values is not None and self.objective.plain:
                parts["plain"] = cross_entropy(self._decode(None, None, False, **run).logits, labels)
            loss = parts[term] if readout is None else self.objective.total(parts)
        return LarimarOutput(
            loss,
            outputs.logits,
            parts or None,
            readout,
            output_cache(outputs),
            outputs.get("hidden_states"),
            outputs.get("attentions"),
        )

    def _decode(self, readout: Tensor | None, cache: Cache | None, use_cache: bool | None, **run):
        return decode(self.decoder, self.conditioning, readout, cache, use_cache, **run)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        readout: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> dict:
        """What `generate` passes to `forward`: the tokens that the cache, less its pseudo-token, lacks."""
        cache = generation_cache(kwargs)
        seen = 0 if cache is None else max(0, cache.get_seq_length() - 1)
        return {
            "input_ids": input_ids[:, seen:],
            "cache": cache,
            "attention_mask": attention_mask,
            "readout": readout,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            **{
                name: kwargs[name] for name in ("output_attentions", "output_hidden_states") if name in kwargs
            },
        }

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, readout: Tensor | None = None, **kwargs: Any) -> Any:
        """Write texts on, conditioned on a readout: transformers' `generate`, greedy, by beams or samples.

        Args:
            inputs: `[batch, length]`, padded on the left; or `input_ids=`.
            readout: `[batch, latent]`; None, or zeros throughout: the bare decoder's own `generate`.
            **kwargs: `attention_mask`, `max_new_tokens`, `num_beams` and what else transformers takes.
        """
        if readout is None or not readout.any():
            return self.decoder.generate(inputs, **kwargs)
        tokens = kwargs.get("input_ids") if inputs is None else inputs
        check.expect(tokens is not None, "inputs", "token ids", "none", TypeError)
        check_readout(readout, len(tokens), self.memory.latent)
        return super().generate(inputs, readout=readout, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        state_dict: dict | None = None,
        is_main_process: bool = True,
        *,
        config: None = None,
        model_card_kwargs: None = None,
    ) -> None:
        """Write `config.json`, `model.safetensors` and, where facts are written, the folder `memory`.

        Stored are the conditioning and each base that has no name or is trained; the others are loaded by
        their names again. Of several processes only the main one writes. A model that is there is replaced.

        Args:
            save_directory: a folder, which is made if need be.
            state_dict: weights to write in place of the model's own.
            is_main_process: whether to write.
            config, model_card_kwargs: None; `push_to_hub` passes them.

        Raises:
            EngramError: the folder cannot be made or written, or its `memory` may not be replaced: see
                `EpisodicMemory.save_pretrained`.
        """
        if not is_main_process:
            return
        folder = writable_directory(save_directory, "save_directory")
        memory = folder / files.MEMORY
        # First, as it may be refused; an empty one is written only where it has to replace another.
        if len(self.memory) or memory.exists():
            self.memory.save_pretrained(memory, replace=True)
        self.config.architectures = [type(self).__name__]
        state = self.state_dict() if state_dict is None else state_dict
        files.write(folder, self.config.to_json_string(use_diff=False), self._stored(state))

    def adopt(self, folder: Path) -> None:
        """Take what a folder holds for this model's own, where another has put it there."""
        if (folder / files.MEMORY).is_dir():
            self.memory.adopt(folder / files.MEMORY)

    @classmethod
    def _read_folder(
        cls, folder: Path, encoder: nn.Module | None = None, decoder: nn.Module | None = None
    ) -> LarimarModel:
        settings, state = files.read(folder, LarimarConfig.model_type)
        config = LarimarConfig(**settings)
        encoder = config.encoder_name if encoder is None else encoder
        decoder = config.decoder_name if decoder is None else decoder
        model = cls(config, *_bases(encoder, decoder))
        files.check_weights(folder, state, model._stored(model.state_dict()))
        model.load_state_dict(state, strict=False)
        if (folder / files.MEMORY).is_dir():
            memory = EpisodicMemory.from_pretrained(folder / files.MEMORY)
            got, wanted = memory.settings, model.memory.settings
            if got != wanted:
                raise EngramError(f"name_or_directory: expected a memory of {wanted}, got one of {got}")
            model.memory = memory.to(model.memory.gram.device)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_directory: str | os.PathLike,
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        **options: Any,
    ) -> LarimarModel:
        """Read a model that `save_pretrained` wrote, in evaluation mode.

        Args:
            name_or_directory: a folder, or the name of a repository on the Hub.
            encoder: a base that is loaded already, in place of the one named in the configuration.
            decoder: likewise.
            **options: `revision` and `token`, of the Hub.

        Raises:
            EngramError: no such folder, incomplete or damaged files, or a base that cannot be had.
        """
        return super().from_pretrained(name_or_directory, encoder=encoder, decoder=decoder, **options)

    def _stored(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in state.items() if self._is_stored(name)}

    def _is_stored(self, name: str) -> bool:
        part = name.split(".")[0]
        if part in ("encoder", "decoder"):
            named = getattr(self.config, f"{part}_name") is not None
            return not named or getattr(self.config, f"train_{part}")
        return part == "conditioning"

    def __repr__(self) -> str:
        parts = (f"{name}={type(getattr(self, name)).__name__}" for name in ("encoder", "decoder"))
        return f"{type(self).__name__}({', '.join(parts)},\n  memory={self.memory!r})"


def _bases(
    encoder: str | nn.Module | None, decoder: str | nn.Module | None
) -> tuple[nn.Module | None, nn.Module | None]:
    """Load what is given by name."""
    encoder = load_encoder(encoder).model if isinstance(encoder, str) else encoder
    decoder = load_model(decoder)[0] if isinstance(decoder, str) else decoder
    return encoder, decoder
