"""How a `LarimarModel` is put together."""

from __future__ import annotations

from typing import Any, ClassVar

from .. import _checks as check
from ..hf.modeling import AutoConfig, PreTrainedConfig
from ..hf.pooling import POOLINGS
from ..memory.addressing import check_addressing


class LarimarConfig(PreTrainedConfig):
    """How a `LarimarModel` is put together.

    Args:
        encoder: the encoder's configuration, as a dictionary.
        decoder: the decoder's.
        encoder_name: `"minilm"`, a Hub name or a folder, where the encoder comes from one.
        decoder_name: `"smollm2"`, a Hub name or a folder, where the decoder comes from one.
        slots: K, of the memory.
        ridge: λ, of the memory.
        seed: of the memory's M0.
        addressing: `"key"`: a fact is written at its key's address and read at the query's, `w = z M0⁺`;
            `"content"`: read by the memory's own projection, `w = z M⁺`, as in the paper.
        pooling: of the encoder's states, as for `SentenceEncoder`.
        hidden: size of the conditioning's hidden layer; 0: one linear map, as in the paper.
        train_encoder: whether the encoder is trained, and stored, too.
        train_decoder: likewise. A frozen decoder answers as before where there is no readout.
    """

    model_type = "larimar"
    keys_to_ignore_at_inference: ClassVar = ["parts", "readout", "cache"]

    def __init__(
        self,
        encoder: dict | None = None,
        decoder: dict | None = None,
        encoder_name: str | None = None,
        decoder_name: str | None = None,
        slots: int = 512,
        ridge: float = 1e-2,
        seed: int = 0,
        addressing: str = "key",
        hidden: int = 1024,
        train_encoder: bool = False,
        train_decoder: bool = False,
        pooling: str = "mean",
        **kwargs: Any,
    ):
        check_addressing(addressing)
        check.expect(pooling in POOLINGS, "pooling", f"one of {', '.join(POOLINGS)}", repr(pooling))
        check.integer("hidden", hidden)
        check.expect(hidden >= 0, "hidden", "a size, or 0 for none", hidden)
        check.number("ridge", ridge, at_least=0)
        self.encoder = encoder
        self.decoder = decoder
        self.encoder_name = encoder_name
        self.decoder_name = decoder_name
        self.slots = slots
        self.ridge = ridge
        self.seed = seed
        self.addressing = addressing
        self.hidden = hidden
        self.pooling = pooling
        self.train_encoder = train_encoder
        self.train_decoder = train_decoder
        super().__init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The decoder's configuration, which generation asks for layers and vocabulary."""
        return self if self.decoder is None else configuration_of(self.decoder)


def configuration_of(settings: dict | None) -> PreTrainedConfig:
    """The configuration of a base that a dictionary describes."""
    given = isinstance(settings, dict)
    check.expect(given, "config", "configurations of encoder and decoder", settings, TypeError)
    return AutoConfig.for_model(**settings)
