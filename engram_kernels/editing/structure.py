"""Find by structure, not by name, the matrix that an edit writes: the output projection of an MLP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import EngramError
from ..models.layers import decoder_layers

EDITABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# ROME's layers lie at 0.16 (Llama-2-7B, 5 of 32) to 0.36 (GPT-2 XL, 17 of 48) of the depth. Of SmolLM2's
# layers 4, 6, 8 and 11, the sixth disturbed facts about other subjects least at the same efficacy.
DEFAULT_DEPTH = 0.2


@dataclass(frozen=True)
class Projection:
    """The output projection of a layer's MLP: an associative memory from keys `[in]` to values `[out]`."""

    layer: int
    name: str
    module: nn.Module
    transposed: bool

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as `[out, in]`: a view, so that writing to it edits the model."""
        weight = self.module.weight.detach()
        return weight.T if self.transposed else weight


def default_layer(model: nn.Module) -> int:
    """The layer that is edited when none is asked for: the one at 0.2 of the depth."""
    return round(DEFAULT_DEPTH * len(decoder_layers(model)[1]))


def output_projection(model: nn.Module, layer: int) -> Projection:
    """The output projection of the MLP of decoder layer `layer`.

    Among the linear maps that are children of one module, an MLP has one or two that read the hidden size and
    write the intermediate size (or twice that, where gate and up are fused), and then one that maps back;
    attention has three or a fused one of another width. The layer must hold exactly one MLP.

    Args:
        model: a causal language model.
        layer: index of the decoder layer, counted from 0.

    Raises:
        TypeError: `layer` is not an integer.
        ValueError: `layer` is out of range.
        EngramError: the layer has no MLP of plain linear maps, or several (a mixture of experts), or its
            matrix cannot be edited soundly (quantised, parametrised, on the meta device, made in inference
            mode, shared with another module).
    """
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer: expected an integer, got {type(layer).__name__}")
    stack, layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer: expected from 0 to {len(layers) - 1} for this model, got {layer}")
    block = layers[layer]
    for name, module in block.named_modules():
        if hasattr(module, "base_layer"):
            raise EngramError(
                f"model: expected plain weights in layer {layer}, got an adapter on {name!r}: merge it first"
            )
        if hasattr(module, "qweight") or any(
            _is_packed(weight) for weight in module.parameters(recurse=False)
        ):
            raise EngramError(
                f"model: expected floating-point weights in layer {layer}, got quantised ones in {name!r}"
            )
    hidden = model.get_input_embeddings().weight.shape[-1]
    found = [
        (f"{name}.{child}" if name else child, module)
        for name, parent in block.named_modules()
        for child, module in _mlp_outputs(parent, hidden)
    ]
    if len(found) > 1:
        # A fused attention of unusual width can look like an MLP: a width in the configuration decides.
        width = getattr(model.config, "intermediate_size", None)
        found = [(name, module) for name, module in found if _shape(module)[0] == width] or found
    if len(found) != 1:
        got = ", ".join(name for name, _ in found) or "none"
        raise EngramError(f"model: expected one MLP of plain linear maps in layer {layer}, got {got}")
    name, module = found[0]
    projection = Projection(layer, f"{stack}.{layer}.{name}", module, _is_transposed(module))
    _check_editable(model, projection)
    return projection


def _mlp_outputs(parent: nn.Module, hidden: int) -> list[tuple[str, nn.Module]]:
    """The last child of `parent` that closes an MLP, as a list of at most one `(name, module)`."""
    linear = [(name, child, *_shape(child)) for name, child in parent.named_children() if _is_linear(child)]
    opening = [width_out for _, _, width_in, width_out in linear if width_in == hidden]
    if len(opening) not in (1, 2):
        return []
    closing = [
        (name, child)
        for name, child, width_in, width_out in linear
        if width_out == hidden
        and width_in != hidden
        and all(width in (width_in, 2 * width_in) for width in opening)
    ]
    return closing[-1:]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """GPT-2's `Conv1D` is a linear map that keeps its weight as `[in, out]`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and module.weight.dim() == 2


def _shape(module: nn.Module) -> tuple[int, int]:
    """`(in, out)` of a linear map."""
    rows, columns = module.weight.shape
    return (rows, columns) if _is_transposed(module) else (columns, rows)


def _is_packed(weight: torch.Tensor) -> bool:
    return not weight.is_floating_point() or weight.element_size() == 1


def _check_editable(model: nn.Module, projection: Projection) -> None:
    weight = projection.module._parameters.get("weight")
    if weight is None:
        raise EngramError(
            f"model: expected a plain weight in {projection.name!r}, got one that is computed from others "
            "(parametrised or pruned): make it permanent first"
        )
    if weight.is_inference():
        raise EngramError(
            f"model: expected weights made outside inference mode, got inference ones in {projection.name!r}"
        )
    if weight.dtype not in EDITABLE_DTYPES:
        raise EngramError(
            f"model: expected float32, bfloat16 or float16 weights, got {weight.dtype} in {projection.name!r}"
        )
    if weight.is_meta:
        raise EngramError(
            f"model: expected its weights in memory, got {projection.name!r} on the meta device (offloaded)"
        )
    # By memory, not by object: two parameters may be views of one storage.
    memory = weight.untyped_storage().data_ptr()
    sharing = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name != f"{projection.name}.weight"
        and parameter.device == weight.device
        and parameter.untyped_storage().data_ptr() == memory
    ]
    if sharing:
        raise EngramError(
            f"model: expected a weight of its own in {projection.name!r}, got one shared with {sharing[0]!r}"
        )
