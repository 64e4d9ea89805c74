"""How an encoder's states become one latent for each text, as sentence-transformers' files beside it say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import EngramError

# By sentence-transformers' names for them: the mean over a text's tokens, its first one, its last one.
POOLINGS = ("mean", "cls", "lasttoken")
_MODULES = "modules.json"
# What may stand around the pooling: the encoder itself, and a length of 1, which the caller chooses.
_KNOWN = ("Transformer", "Pooling", "Normalize")


def pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One latent for each text: the mean of its tokens' states, or one of them.

    Args:
        states: [N, T, C].
        mask: [N, T], 1 for a text's own tokens, wherever the padding stands.
        pooling: one of `POOLINGS`.

    Returns:
        [N, C] in fp32; zeros for a text without tokens.
    """
    own = mask.bool()
    if pooling == "mean":
        # In fp32: a sum over hundreds of half-precision states would lose digits. Not times the mask: a
        # padding's state may be NaN.
        total = torch.where(own.unsqueeze(-1), states.float(), 0).sum(1)
        return total / own.sum(1, keepdim=True).clamp_min(1)
    place = own.int().argmax(1) if pooling == "cls" else own.shape[1] - 1 - own.flip(1).int().argmax(1)
    chosen = states[torch.arange(len(states), device=states.device), place].float()
    return torch.where(own.any(1, keepdim=True), chosen, 0)


def pooling_of(name_or_directory: str | os.PathLike) -> str:
    """How sentence-transformers pools an encoder's states, by its files; "mean" where there are none.

    Args:
        name_or_directory: a folder, or a name on the Hub.

    Raises:
        EngramError: the files ask for what is not done here, such as a layer behind the pooling.
    """
    modules = _read(name_or_directory, _MODULES)
    if modules is None:
        return "mean"
    try:
        # Of "sentence_transformers.models.Pooling" the last part; the packages before it have moved.
        paths = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
        others = [kind for kind in paths if kind not in _KNOWN]
        if others:
            raise EngramError(
                "name_or_directory: expected an encoder whose latents are its pooled states, got "
                f"{str(name_or_directory)!r}, which sentence-transformers passes through {others[0]} too"
            )
        if "Pooling" not in paths:
            return "mean"
        return _chosen(_read(name_or_directory, f"{paths['Pooling']}/config.json") or {}, name_or_directory)
    except (KeyError, TypeError, AttributeError) as error:
        raise EngramError(
            f"name_or_directory: expected sentence-transformers' {_MODULES} in {str(name_or_directory)!r}, "
            f"got one that cannot be read ({error})"
        ) from error


def _chosen(config: dict[str, Any], name_or_directory: str | os.PathLike) -> str:
    """The pooling that a configuration names: in one word, or by a switch for each."""
    named = config.get("pooling_mode")
    found = [named] if isinstance(named, str) else list(named or ())
    switches = {"cls_token": "cls", "mean_tokens": "mean"}
    on = [name.removeprefix("pooling_mode_") for name, value in config.items() if value is True]
    found = found or [switches.get(name, name) for name in on if f"pooling_mode_{name}" in config]
    if len(found) != 1 or found[0] not in POOLINGS:
        raise EngramError(
            f"name_or_directory: expected an encoder with one pooling of {', '.join(POOLINGS)}, got "
            f"{' and '.join(map(str, found)) or 'none'} in {str(name_or_directory)!r}"
        )
    return found[0]


def _read(name_or_directory: str | os.PathLike, file: str) -> Any:
    """A JSON file of a folder or of a repository on the Hub; None where there is none."""
    path: str | os.PathLike | None = Path(name_or_directory) / file
    if not Path(name_or_directory).is_dir():
        path = _on_the_hub(str(name_or_directory), file)
    try:
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise EngramError(
            f"name_or_directory: expected {file} of {str(name_or_directory)!r} in JSON, got none ({error})"
        ) from error


def _on_the_hub(name: str, file: str) -> str | None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return huggingface_hub.hf_hub_download(name, file)
    # No such file, name or network: whoever reads the encoder says what is wrong.
    except (OSError, ValueError, HfHubHTTPError):
        return None
