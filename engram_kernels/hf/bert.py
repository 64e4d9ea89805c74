"""A BERT encoder in torch's own layers, as importing transformers costs more than all else does to encode."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

# What this encoder is, and no other that calls itself BERT.
_EXPECTED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
# The two feed-forward matrices and the two norms of a layer: torch's names and BERT's.
_PARTS = {
    "self_attn.out_proj": "attention.output.dense",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm1": "attention.output.LayerNorm",
    "norm2": "output.LayerNorm",
}


class Bert(nn.Module):
    """BERT's encoder, without its pooler.

    Args:
        config: of transformers, as JSON has it.
        weights: its tensors by the names that transformers gives them.

    Source: Devlin et al. 2019 (arXiv 1810.04805).
    """

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]):
        super().__init__()
        self.config = SimpleNamespace(**config)
        size, eps = config["hidden_size"], config["layer_norm_eps"]
        # The layers only are initialised in vain: the meta device would import more than it saves.
        self.words, self.positions, self.types = (
            nn.Embedding.from_pretrained(weights[f"embeddings.{name}_embeddings.weight"])
            for name in ("word", "position", "token_type")
        )
        self.norm = nn.LayerNorm(size, eps=eps)
        layer = nn.TransformerEncoderLayer(
            size,
            config["num_attention_heads"],
            config["intermediate_size"],
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=eps,
            batch_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, config["num_hidden_layers"], enable_nested_tensor=False)
        self.load_state_dict(_renamed(weights, config["num_hidden_layers"]), strict=False, assign=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """Return the last states of tokens.

        Args:
            input_ids: [N, T].
            attention_mask: [N, T], 1 for a text's own tokens.

        Returns:
            `last_hidden_state`, [N, T, C].
        """
        places = self.positions.weight[: input_ids.shape[1]]
        states = self.norm(self.words(input_ids) + places + self.types.weight[0])
        return SimpleNamespace(
            last_hidden_state=self.layers(states, src_key_padding_mask=attention_mask == 0)
        )


class BertTokenizer:
    """A saved fast tokenizer, as `SentenceEncoder` calls it."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # It has no other.
            raise ValueError(str(error)) from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.unk_token_id = self.tokenizer.token_to_id(self.tokenizer.model.unk_token)
        self.model_max_length = _json(folder / "tokenizer_config.json").get("model_max_length", 10**30)

    def __call__(
        self, text: str, truncation: bool = False, max_length: int | None = None
    ) -> dict[str, list[int]]:
        if truncation and max_length is not None:
            self.tokenizer.enable_truncation(max_length)
        ids = self.tokenizer.encode(text).ids
        self.tokenizer.no_truncation()
        return {"input_ids": ids}


def read_bert(folder: Path) -> tuple[Bert, BertTokenizer] | None:
    """Read an encoder and its tokenizer without transformers; None where that must read them.

    Args:
        folder: with `config.json`, `model.safetensors` and `tokenizer.json`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = _json(folder / "config.json")
        given = {"position_embedding_type": "absolute", **config}
        if (
            any(given.get(name) != value for name, value in _EXPECTED.items())
            or "quantization_config" in config
        ):
            return None
        weights = load_file(folder / "model.safetensors")
        weights = {name.removeprefix("bert."): tensor.float() for name, tensor in weights.items()}
        return Bert(config, weights).eval(), BertTokenizer(folder)
    # No such file, another layout, other names: transformers knows it, or says what is wrong.
    except (
        OSError,
        ImportError,
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
    ):
        return None


def _renamed(saved: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """All but the embeddings, by torch's names."""
    found = {}
    for kind in ("weight", "bias"):
        found[f"norm.{kind}"] = saved[f"embeddings.LayerNorm.{kind}"]
        for i in range(layers):
            mine, theirs = f"layers.layers.{i}", f"encoder.layer.{i}"
            parts = [saved[f"{theirs}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            found[f"{mine}.self_attn.in_proj_{kind}"] = torch.cat(parts)
            for here, there in _PARTS.items():
                found[f"{mine}.{here}.{kind}"] = saved[f"{theirs}.{there}.{kind}"]
    return found


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
