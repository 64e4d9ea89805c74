"""The search for a value, for ROME's `compute_v` and MEMIT's `compute_z`: their texts and loss, our passes.

What is searched for is theirs to the letter: their context templates, their tokens and positions, their
divergence at the subject's last token of "{} is a", their δ added to the output of the MLP (ROME) or of the
layer (MEMIT). Only how it is computed differs (`editing.search.values`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from ..editing.edit import Edit
from ..editing.search.batching import EncodedEdit
from ..editing.search.values import ValueOptions, find_values
from ..errors import EngramError
from ..hf.hooks import Stop, capture, run_until
from ..hf.layers import decoder_layers
from ..hf.placement import input_device
from ..hf.projection import Projection
from ..hf.tokens import Row
from .patching import Declined

KL_PROMPT = "{} is a"


@dataclass(frozen=True)
class Dialect:
    """In what the libraries' searches differ.

    Attributes:
        special_tokens: the target is tokenised with the tokenizer's special tokens.
        strips: a beginning-of-text or unknown token before the target is taken away.
        casts: `δ` takes the type of what it is added to; without, what is added takes the wider of both.
        averages: `enable_random_prefix_keys` says whether keys are means over the contexts (R-ROME).
    """

    special_tokens: bool = False
    strips: bool = False
    casts: bool = True
    averages: bool = False


@dataclass(frozen=True)
class ReadRow(Row):
    """A row whose last tokens need not be those that it is to predict.

    The target's text is cut before its last token and joined to the prompt, and may be tokenised otherwise
    there; the loss asks for the target's own tokens all the same.

    Attributes:
        read: what the model reads.
    """

    read: list[int]

    @property
    def inputs(self) -> list[int]:
        """What the model reads."""
        return self.read


def compute_v(module: ModuleType, dialect: Dialect) -> Callable[..., Tensor]:
    """The right vector of ROME's update, as `compute_v` of a library gives it.

        (v₀ + δ − W k) / (k · u)

    Args:
        module: where the library's `compute_v` is.
        dialect: of the library.
    """

    def right_vector(model, tok, request, hparams, layer, left_vector, context_templates):
        name = hparams.mlp_module_tmp.format(layer)
        start, change = _search(module, dialect, model, tok, request, hparams, layer, context_templates, name)

        def key_and_output(template):
            return module.get_module_input_output_at_word(
                model,
                tok,
                layer,
                context_template=template,
                word=request["subject"],
                module_template=hparams.rewrite_module_tmp,
                fact_token_strategy=hparams.fact_token,
            )

        averaged = dialect.averages and hparams.enable_random_prefix_keys
        prompt = request["prompt"]
        templates = [context.format(prompt) for context in context_templates] if averaged else [prompt]
        keys, outputs = zip(*map(key_and_output, templates), strict=True)
        key, output = torch.stack(keys).mean(0), torch.stack(outputs).mean(0)
        # R-ROME without averages starts from the output itself.
        target = (output if dialect.averages and not averaged else start) + change
        if dialect.casts:
            left_vector, target = left_vector.to(key), target.to(output)
        return (target - output) / torch.dot(key, left_vector)

    return right_vector


def compute_z(module: ModuleType, dialect: Dialect) -> Callable[..., Tensor]:
    """The target state of MEMIT's last layer, as `compute_z` of a library gives it: `z₀ + δ`.

    Args:
        module: where the library's `compute_z` is.
        dialect: of the library.
    """

    def target_state(model, tok, request, hparams, layer, context_templates):
        contexts = [context for kind in context_templates for context in kind]
        name = hparams.layer_module_tmp.format(layer)
        start, change = _search(
            module, dialect, model, tok, request, hparams, layer, contexts, name, _reads_the_last_layer
        )
        return start + change

    return target_state


def _search(
    module, dialect: Dialect, model, tok, request, hparams, layer: int, contexts: Sequence[str], name: str,
    check_loss: Callable | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`δ` at the output of the module of that name, and the output that it starts from: both `[width]`."""
    _check_place(model, layer, name)
    texts = _texts(module, dialect, model, tok, request, hparams, contexts)
    start = _start(model, name, texts.rewriting[0], layer, hparams, check_loss)
    try:
        options = ValueOptions(
            steps=hparams.v_num_grad_steps,
            learning_rate=hparams.v_lr,
            clamp=hparams.clamp_norm_factor,
            weight_decay=hparams.v_weight_decay,
            kl_weight=hparams.kl_factor,
        )
    except (TypeError, ValueError) as error:
        raise Declined(f"its hyper-parameters give {error}") from error
    # Where δ is added, which need not be a matrix.
    place = Projection(layer, name, model.get_submodule(name), transposed=False, path=name)
    (found,) = find_values(model, place, [texts], options)
    if isinstance(found, EngramError):
        raise found
    change = found.change.to(start.device)
    return start, change.to(start.dtype) if dialect.casts else change


def _check_place(model: nn.Module, layer: int, name: str) -> None:
    """Make sure that the module lies in the layer of that number."""
    if model.training:
        raise Declined("the model is in training mode")
    if next(model.parameters()).dtype == torch.float64:
        raise Declined("the model is in float64")
    try:
        stack, layers = decoder_layers(model)
        model.get_submodule(name)
    except (EngramError, AttributeError) as error:
        raise Declined(str(error)) from error
    if not 0 <= layer < len(layers) or not f"{name}.".startswith(f"{stack}.{layer}."):
        raise Declined(f"{name} is not in layer {layer} of {stack}")


def _texts(module, dialect: Dialect, model, tok, request, hparams, contexts: Sequence[str]) -> EncodedEdit:
    """The library's rows: the same tokens read, the same positions, the same tokens asked for."""
    if tok.padding_side != "right":
        raise Declined(f"the tokenizer pads on the {tok.padding_side}")
    target, subject = request["target_new"], request["subject"]
    target = target["str"] if isinstance(target, dict) else target
    wanted = list(tok(target, add_special_tokens=dialect.special_tokens)["input_ids"])
    if dialect.strips and wanted and wanted[0] in (tok.bos_token_id, tok.unk_token_id):
        wanted = wanted[1:]
    if not wanted:
        raise Declined("the target has no token")
    prompts = [context.format(request["prompt"]) for context in contexts]
    # EasyEdit's ROME asks for the text without the target, from which it counts its last token.
    asks = "input_prompt" in inspect.signature(module.find_fact_lookup_idx).parameters

    def encode(prompt: str, end: str) -> tuple[list[int], int]:
        keywords = {"input_prompt": prompt.format(subject)} if asks else {}
        at = module.find_fact_lookup_idx(
            prompt + end, subject, tok, hparams.fact_token, verbose=False, **keywords
        )
        read = list(tok((prompt + end).format(subject))["input_ids"])
        if not 0 <= at < len(read):
            raise Declined(f"fact_token {hparams.fact_token!r} gives position {at} of {len(read)} tokens")
        return read, at

    rewriting: list[Row] = []
    for prompt in prompts:
        read, at = encode(prompt, tok.decode(wanted[:-1]))
        first = len(read) + 1 - len(wanted)
        if at >= first:
            raise Declined("the target's first token would be predicted left of where the value is added")
        rewriting.append(ReadRow(read[:first] + wanted, at, first, read))
    kl_prompt, at = encode(KL_PROMPT, "")
    try:
        edit = Edit(subject, request["prompt"], target)
    except (TypeError, ValueError) as error:
        raise Declined(str(error)) from error
    # Their divergence is that of the prediction at the subject's last token; nothing right of it matters.
    return EncodedEdit(edit, rewriting, Row(kl_prompt[: at + 1], at, at + 1))


@torch.no_grad()
def _start(model, name: str, row: Row, layer: int, hparams, check_loss: Callable | None) -> Tensor:
    """The module's output at the first row's subject, by one pass over that row."""
    seen: list[Tensor] = []

    def see(_module, inputs, output):
        if not inputs or not isinstance(output, Tensor) or output.shape[:2] != (1, len(row.inputs)):
            raise Declined(f"{name} does not map one state for every token to one")
        seen.append(output[0, row.subject])
        if check_loss is None:
            raise Stop

    ids = torch.tensor([row.inputs], device=input_device(model))
    with capture(after={model.get_submodule(name): see}):
        if check_loss is None:
            run_until(model, input_ids=ids)
        else:
            check_loss(model, ids, layer, hparams)
    if len(seen) != 1:
        raise Declined(f"{name} runs {len(seen)} times in a pass")
    return seen[0]


def _reads_the_last_layer(model: nn.Module, ids: Tensor, layer: int, hparams) -> None:
    """Make sure that the loss, read off `v_loss_layer` by final norm and head, is that of the predictions."""
    stack, layers = decoder_layers(model)
    read = hparams.layer_module_tmp.format(max(hparams.v_loss_layer, layer))
    if read != f"{stack}.{len(layers) - 1}":
        raise Declined(f"v_loss_layer reads {read}, not the last layer")
    seen: list[Tensor] = []
    with capture(after={layers[-1]: lambda _module, _inputs, output: seen.append(output)}):
        logits = model(input_ids=ids, use_cache=False).logits
    try:
        norm, head = (model.get_submodule(path) for path in (hparams.ln_f_module, hparams.lm_head_module))
    except AttributeError as error:
        raise Declined(str(error)) from error
    weights = [weight.to(logits.device) for weight in head.parameters(recurse=False)]
    if isinstance(seen[0], Tensor) and weights and weights[0].shape == (logits.shape[-1], seen[0].shape[-1]):
        own = nn.functional.linear(norm(seen[0]).to(logits.device), *weights)
        if (own - logits).abs().max() <= 32 * torch.finfo(logits.dtype).eps * logits.abs().max():
            return
    raise Declined(f"{hparams.lm_head_module} after {hparams.ln_f_module} does not give the model's logits")
