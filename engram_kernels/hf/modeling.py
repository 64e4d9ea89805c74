"""What a model of transformers' own kind is made of. Importing this imports transformers."""

from __future__ import annotations

import inspect

from .loading import import_transformers

import_transformers()

import transformers  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput  # noqa: E402

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "Cache",
    "GenerationMixin",
    "ModelOutput",
    "PreTrainedConfig",
    "PreTrainedModel",
]


class GenerationMixin(transformers.GenerationMixin):
    """`generate` for a model that takes and returns its cache as `cache`, whatever transformers calls it."""

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *arguments, **keywords):
        kept = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *arguments, **keywords)
        if outputs.cache is not None:
            kept[_CACHE] = outputs.cache
        return kept


_TAKEN = inspect.signature(transformers.GenerationMixin.prepare_inputs_for_generation).parameters
_CACHE = "cache" if "cache" in _TAKEN else "past_key_values"
