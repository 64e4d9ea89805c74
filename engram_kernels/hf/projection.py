"""Find by structure, not by name, the matrix that an edit writes: the output projection of an MLP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import EngramError
from .experts import Expert, is_fused, opened_expert
from .layers import MODEL_DTYPES, decoder_layer, decoder_layers
from .placement import divide_again, is_fsdp, is_offloaded, is_sharded, local, plain_name, unwrapped, whole

# ROME's layers lie at 0.16 (Llama-2-7B, 5 of 32) to 0.36 (GPT-2 XL, 17 of 48) of the depth. Of SmolLM2's
# layers 4, 6, 8 and 11, the sixth disturbed facts about other subjects least at the same efficacy.
DEFAULT_DEPTH = 0.2


@dataclass(frozen=True)
class Projection:
    """The output projection of a layer's MLP: an associative memory from keys `[in]` to values `[out]`.

    Attributes:
        layer: index of the decoder layer.
        name: of the module, as it is in the model without adapters: edits are kept under this name.
        module: the linear map itself.
        transposed: whether it keeps its weight as `[in, out]`.
        path: where the module stands in this model, inside of an adapter's wrapper.
        fsdp: the modules above by which FSDP2 divides it.
    """

    layer: int
    name: str
    module: nn.Module
    transposed: bool
    path: str
    fsdp: tuple[nn.Module, ...] = ()

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as `[out, in]`: a view, so that writing to it edits a model that is not divided."""
        weight = self.weight.detach()
        return weight.T if self.transposed else weight

    @property
    def weight(self) -> torch.Tensor:
        """The weight as it is kept, in parts where ranks divide it."""
        for module in self.fsdp:
            # After some passes it is whole for a while, and writes to that would be lost.
            module.reshard()
        return self.module.weight

    def whole(self) -> torch.Tensor:
        """The weight as `[out, in]` with the parts of all ranks; every one of them makes this call."""
        weight = whole(self.weight)
        return weight.T if self.transposed else weight

    def inputs(self, states: torch.Tensor) -> torch.Tensor:
        """The whole inputs `[..., in]`, where a hook before the module sees this rank's part."""
        if not is_sharded(self.module.weight):
            return states
        if not is_sharded(states):
            # Some plans (Phi-3's) give every rank the whole.
            if states.shape[-1] == self.module.in_features:
                return states
            from torch.distributed.tensor import DTensor, Shard

            shape = (*states.shape[:-1], self.module.in_features)
            stride = torch.empty(shape, device="meta").stride()
            mesh = self.module.weight.device_mesh
            states = DTensor.from_local(
                states, mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride
            )
        return states.full_tensor()


def default_layer(model: nn.Module, depth: float = DEFAULT_DEPTH) -> int:
    """The layer that is edited when none is asked for: the one at that share of the depth."""
    return round(depth * len(decoder_layers(model)[1]))


def output_projection(model: nn.Module, layer: int) -> Projection:
    """The output projection of the MLP of decoder layer `layer`.

    Where a LoRA of PEFT wraps it, this is the base layer: the LoRA adds to its output, so that an edit of its
    weight changes the sum by just as much, with the LoRA on or off.

    Args:
        model: a causal language model, also one of PEFT's.
        layer: index of the decoder layer, counted from 0.

    Raises:
        TypeError: `layer` is not an integer.
        ValueError: `layer` is out of range.
        EngramError: the layer has no MLP of linear maps, or several, or its matrix cannot be edited
            soundly (quantised, parametrised, offloaded, made in inference mode, shared with another module,
            in an adapter that does not add to it or is merged into it).
    """
    model = unwrapped(model)
    divide_again(model)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise EngramError("model: expected one that reads its prompt alone, got one with a learnt prompt")
    path, module = wrapped_projection(model, layer)
    while hasattr(module, "base_layer"):
        _check_adapter(module, path)
        path, module = f"{path}.base_layer", module.base_layer
    name = plain_name(path.removeprefix("base_model.model.").replace(".base_layer", ""))
    fsdp = [
        above
        for own, above in model.named_modules()
        if is_fsdp(above) and (not own or f"{path}.".startswith(f"{own}."))
    ]
    projection = Projection(layer, name, module, _is_transposed(module), path, tuple(fsdp))
    _check_editable(model, projection)
    return projection


def wrapped_projection(model: nn.Module, layer: int) -> tuple[str, nn.Module]:
    """The path and the module of a layer's output projection, with any weight and any adapter around it.

    An MLP's module has one or two linear children that map the hidden size to the intermediate size (or to
    twice that, where gate and up are fused), and then one that maps back; attention has three, or a fused one
    of another width. The layer must have exactly one MLP. In a mixture of experts this is the routed expert
    that is open, else the shared one.

    Raises:
        TypeError: `layer` is not an integer.
        ValueError: `layer` is out of range.
        EngramError: the layer has no MLP of linear maps, or several.
    """
    model = unwrapped(model)
    path, block = decoder_layer(model, layer)
    hidden = model.get_input_embeddings().weight.shape[-1]
    for name, module in block.named_modules():
        expert = opened_expert(module)
        if expert is not None:
            return f"{path}.{name}.down_proj.{expert.number}", expert
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
        routed = any(parameter.dim() == 3 for parameter in block.parameters())
        none = "routed experts alone: open one with editing.open_expert" if routed else "none"
        got = ", ".join(name for name, _ in found) or none
        raise EngramError(f"model: expected one MLP of linear maps in layer {layer}, got {got}")
    name, module = found[0]
    return f"{path}.{name}", module


def searched_projection(model: nn.Module, layer: int) -> Projection:
    """The output projection of a layer, for a search that reads its inputs and adds to its output.

    Raises:
        TypeError, ValueError, EngramError: as `output_projection`; or FSDP2 divides the model, which a search
            would gather again for every step.
    """
    projection = output_projection(model, layer)
    if projection.fsdp:
        raise EngramError(
            f"model: expected whole replicas or tensor parallelism for a search, got {projection.name!r} "
            "divided by FSDP2: make the edit on a model of that kind, save it, and apply it to this one"
        )
    return projection


def mlp_output(model: nn.Module, layer: int) -> nn.Module:
    """The module whose output is the MLP's: its last projection with any adapter, or a block of experts.

    Raises:
        TypeError: `layer` is not an integer.
        ValueError: `layer` is out of range.
        EngramError: the layer has no MLP of linear maps, or several.
    """
    _, block = decoder_layer(model, layer)
    for name, module in block.named_modules():
        if is_fused(module) and "." in name:
            return block.get_submodule(name.rpartition(".")[0])
    return wrapped_projection(model, layer)[1]


def _mlp_outputs(parent: nn.Module, hidden: int) -> list[tuple[str, nn.Module]]:
    """The child of `parent` that is an MLP's output projection, as a list of at most one `(name, module)`."""
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
    """Also one that is quantised, whose weight has any shape, or wrapped by an adapter."""
    return _is_transposed(module) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def _is_transposed(module: nn.Module) -> bool:
    """GPT-2's `Conv1D` is a linear map that keeps its weight as `[in, out]`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and module.weight.dim() == 2


def _shape(module: nn.Module) -> tuple[int, int]:
    """`(in, out)` of a linear map."""
    if _is_transposed(module):
        return tuple(module.weight.shape)
    return module.in_features, module.out_features


def _check_adapter(wrapper: nn.Module, path: str) -> None:
    """Raise unless the wrapper's output is its base layer's with something added."""
    if not (hasattr(wrapper, "lora_A") and hasattr(wrapper, "lora_B")):
        raise EngramError(
            f"model: expected no adapter but LoRA on {path!r}, got {type(wrapper).__name__}: merge it first"
        )
    if any(getattr(wrapper, name, None) for name in ("lora_variant", "lora_magnitude_vector")):
        raise EngramError(
            f"model: expected an adapter that adds to the output of {path!r}, got a variant of LoRA that may "
            "not, such as DoRA: merge it first (merge_and_unload)"
        )
    if getattr(wrapper, "merged_adapters", None):
        raise EngramError(
            f"model: expected the weight of {path!r} by itself, got it with a LoRA merged into it: unmerge "
            "the LoRA (unmerge_adapter), or merge it for good (merge_and_unload)"
        )


def _check_editable(model: nn.Module, projection: Projection) -> None:
    module = projection.module
    opened = isinstance(module, Expert)
    weight = module.weight if opened else module._parameters.get("weight")
    if weight is None and is_plain(getattr(module, "weight", None)):
        raise EngramError(
            f"model: expected a plain weight in {projection.name!r}, got one that is computed from others "
            "(parametrised or pruned): make it permanent first"
        )
    if any("_fsdp_wrapped_module" in module._modules for module in model.modules()):
        raise EngramError(
            "model: expected its weights by their names, got FullyShardedDataParallel's flat ones: divide "
            "the model with torch.distributed.fsdp.fully_shard (FSDP2) instead"
        )
    weight = local(weight) if is_sharded(weight) else weight
    if not is_plain(weight):
        got = type(module).__name__ if weight is None else f"{type(weight).__name__} of {weight.dtype}"
        raise EngramError(
            f"model: expected a plain floating-point weight in {projection.name!r}, got {got}; where it is "
            f"quantised, editing.dequantize_layer(model, {projection.layer}) makes this one plain, or make "
            "the edit on the model in full precision and load what it saves on this one with PEFT"
        )
    if weight.is_inference():
        raise EngramError(
            f"model: expected weights made outside inference mode, got inference ones in {projection.name!r}"
        )
    if weight.dtype not in MODEL_DTYPES:
        raise EngramError(
            f"model: expected float32, bfloat16 or float16 weights, got {weight.dtype} in {projection.name!r}"
        )
    if weight.is_meta:
        got = "without values"
        if is_offloaded(module):
            got = (
                f"where accelerate keeps it elsewhere: load the model with a device_map that has layer "
                f"{projection.layer} on a device, or write a saved edit into the checkpoint's files with "
                "engram apply"
            )
        raise EngramError(
            f"model: expected its weights in memory, got {projection.name!r} on the meta device, {got}"
        )
    # By memory, not by object: two parameters may be views of one storage.
    memory = weight.untyped_storage().data_ptr()
    path = projection.path
    own = path.rpartition(".")[0] if opened else f"{path}.weight"
    sharing = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name != own
        and is_plain(local(parameter) if is_sharded(parameter) else parameter)
        and parameter.device == weight.device
        and local(parameter).untyped_storage().data_ptr() == memory
    ]
    if sharing:
        raise EngramError(
            f"model: expected a weight of its own in {projection.name!r}, got one shared with {sharing[0]!r}"
        )


def is_plain(weight: torch.Tensor | None) -> bool:
    """Whether a weight is stored unquantised; some quantised ones are tensors of a class of their own."""
    return (
        type(weight) in (torch.Tensor, nn.Parameter)
        and weight.is_floating_point()
        and weight.element_size() > 1
    )
