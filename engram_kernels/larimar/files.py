"""A `LarimarModel` as a folder: its configuration, the weights that are its own, the folder of its memory."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .._io import new_file, read_json, save_tensors
from ..errors import EngramError
from ..hf.weights import untied

CONFIG, WEIGHTS, MEMORY = "config.json", "model.safetensors", "memory"


def write(folder: Path, config: str, state: dict[str, Tensor]) -> None:
    """Write a configuration in JSON, and weights, into a folder."""
    save_tensors(folder / WEIGHTS, untied(state), {"format": "pt"})
    with new_file(folder / CONFIG) as path:
        path.write_text(config, encoding="utf-8")


def read(folder: Path, model_type: str) -> tuple[dict, dict[str, Tensor]]:
    """Read the arguments of a configuration, and the weights.

    Raises:
        EngramError: incomplete or damaged files, or those of a model of another type.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        settings = read_json(folder / CONFIG)
        state = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EngramError(
            f"name_or_directory: expected a model that save_pretrained wrote, got {str(folder)!r} ({reason})"
        ) from error
    kind = settings.pop("model_type", None) if isinstance(settings, dict) else None
    if kind != model_type:
        raise EngramError(
            f"name_or_directory: expected a model of type {model_type!r}, got {kind!r} in {str(folder)!r}"
        )
    return settings, state


def check_weights(folder: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that weights that were read are those of the model that is to have them.

    Raises:
        EngramError: some are missing, foreign, or of another shape.
    """
    wrong = sorted(untied(expected).keys() ^ state.keys())
    wrong += [name for name in state if name not in wrong and state[name].shape != expected[name].shape]
    if wrong:
        raise EngramError(
            f"name_or_directory: expected the weights of its configuration, got {len(wrong)} that are "
            f"missing, foreign or of another shape in {str(folder)!r}, such as {wrong[0]!r}"
        )
