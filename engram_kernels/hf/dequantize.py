"""One quantised layer made plain, so that it can be edited."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn

from ..errors import EngramError
from .layers import check_dtype
from .projection import is_plain, wrapped_projection

ROWS = 1024


@torch.no_grad()
def dequantize_layer(model: nn.Module, layer: int, dtype: torch.dtype | None = None) -> nn.Linear:
    """Replace the quantised output projection of a layer's MLP by a plain one, for good.

    Where its library can say what the weight stands for (torchao; bitsandbytes' four bits), that is the new
    weight. Else no library is asked how it packs: a linear map is what it answers to the unit vectors,

        Wᵀ = f(I),   with the bias, which is kept as it is, set aside

    to the precision in which it answers: float16 for bitsandbytes' eight bits, and bfloat16 for its four once
    they have run on a CPU with AVX512-BF16. One matrix takes more memory then; all others stay as they are.
    Run with torchao and bitsandbytes on a CPU; not with GPTQ, AWQ or FP8 layers, and not on a GPU.

    Args:
        model: a causal language model with quantised layers.
        layer: index of the decoder layer, counted from 0.
        dtype: of the new weight; None: that of the embeddings, in which the model computes.

    Returns:
        The new module, which is in the model.

    Raises:
        TypeError, ValueError: `layer` is no index of a layer, or `dtype` is not a type of weights.
        EngramError: the layer has no single MLP, its projection is not quantised, an adapter wraps it, or
            what it answers is not finite or not linear. The model is unchanged.

    Example:
        >>> dequantize_layer(model, 6)
        >>> Editor(model, tokenizer).edit(edit, layers=6)
    """
    dtype = check_dtype(model.get_input_embeddings().weight.dtype if dtype is None else dtype)
    path, module = wrapped_projection(model, layer)
    if hasattr(module, "base_layer"):
        raise EngramError(
            f"model: expected no adapter on {path!r}, got {type(module).__name__}: dequantise the base "
            "model first, then load the adapter on it"
        )
    if is_plain(getattr(module, "weight", None)):
        raise EngramError(f"layer: expected a quantised one, got {layer}, whose {path!r} is plain")
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    matrix = _dequantized(weight)
    if matrix is not None and matrix.shape == (module.out_features, module.in_features):
        matrix = matrix.to(dtype)
    else:
        module.bias = None
        try:
            matrix = _answers(module, dtype)
        finally:
            module.bias = bias
    if not matrix.isfinite().all():
        raise EngramError(f"model: expected finite answers of {path!r}, got NaN or infinity")
    plain = nn.Linear(*reversed(matrix.shape), bias=bias is not None, device=matrix.device, dtype=dtype)
    plain.weight.copy_(matrix)
    if bias is not None:
        plain.bias.copy_(bias)
    plain.requires_grad_(False).train(module.training)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, plain)
    return plain


def _dequantized(weight: Tensor | None) -> Tensor | None:
    """What a weight's own library says that it stands for; None where it cannot be asked."""
    if isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize:
        return weight.dequantize()
    state = getattr(weight, "quant_state", None)
    # A forward pass on a CPU with AVX512-BF16 packs the weight anew, which dequantize_4bit does not undo.
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return None
    library = type(weight).__module__.partition(".")[0]
    return importlib.import_module(f"{library}.functional").dequantize_4bit(weight.data, state)


def _answers(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The matrix `[out, in]` of a linear map, some rows of the identity at a time."""
    other = EngramError(f"model: expected linear maps, got a {type(module).__name__} that is not one")
    width = module.in_features
    device = next(tensor.device for tensor in (*module.parameters(), *module.buffers()))
    if module(torch.zeros(1, width, dtype=dtype, device=device)).nan_to_num().any():
        raise other
    columns = []
    for begin in range(0, width, ROWS):
        units = torch.zeros(min(ROWS, width - begin), width, dtype=dtype, device=device)
        units.diagonal(begin).fill_(1)
        columns.append(module(units).to(dtype))
    matrix = torch.cat(columns).T
    # Activations of eight bits are off by a hundredth; what is not linear, by much more.
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, width, generator=generator, device="cpu").to(device, dtype)
    expected = states.float() @ matrix.float().T
    if (module(states).float() - expected).norm() > 0.05 * expected.norm():
        raise other
    return matrix
