"""What the tests of editing share: editors of small random models, and what became of weights."""

import model_zoo
import torch

from engram_kernels.editing import Editor
from engram_kernels.editing import run as run_module
from engram_kernels.editing.search.values import ValueOptions


def small_editor(family="llama", dtype=torch.float32, *, model=None, **arguments):
    """An editor of a small random model; few contexts and steps, so that a test takes a moment."""
    settings = {
        "corpus": model_zoo.TEXTS,
        "contexts": ((4, 2), (6, 2)),
        "ridge": 0.01,
        "value": ValueOptions(steps=10, learning_rate=0.02, weight_decay=0.0),
    }
    return Editor(
        model_zoo.small_model(family, dtype=dtype) if model is None else model,
        model_zoo.byte_level_tokenizer(),
        **{**settings, **arguments},
    )


def weights(model):
    """A copy of every tensor, by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before, model):
    """The names of the tensors whose bits are not as before."""
    return [
        name
        for name, tensor in model.state_dict().items()
        if not torch.equal(_bits(before[name]), _bits(tensor))
    ]


def spy_on_values(monkeypatch):
    """The list to which every value that is found is appended."""
    found, whole = [], run_module.find_values

    def spy(*arguments):
        values = whole(*arguments)
        found.extend(values)
        return values

    monkeypatch.setattr(run_module, "find_values", spy)
    return found


def _bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8)
