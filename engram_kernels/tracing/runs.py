"""The runs of a causal trace: clean, corrupted, and corrupted with states restored, many cells in a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .._progress import Progress
from ..errors import EngramError
from ..hf.cache import cache_inputs, filled_cache, keys_and_values, output_cache
from ..hf.forward import replaying, takes
from ..hf.hooks import capture
from ..hf.layers import decoder_layers
from ..hf.placement import input_device
from ..hf.projection import mlp_output

# In one forward pass, where no batch is asked for.
TOKENS = {"cpu": 1024, "cuda": 16384}


class Runs:
    """The runs of one trace: clean, corrupted, and corrupted with states restored.

    Args:
        model: in evaluation mode, under `no_grad`.
        kind: what is restored.
        ids: the prompt's tokens.
        answer: the tokens whose probability is measured; none: the one that the clean run predicts.
        first: the subject's first token.
        noise: `[samples, subject tokens, width]`.
        batch: the most rows in one forward pass; None: by the number of tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str,
        ids: list[int],
        answer: list[int],
        first: int,
        noise: Tensor,
        batch: int | None,
    ):
        self.model, self.kind, self.first, self.batch = model, kind, first, batch
        # All but the answer's last token are read, and each of its tokens is predicted one position earlier.
        self.answer, self.prompt, self.ids = answer, len(ids), ids + answer[:-1]
        self.layers = decoder_layers(model)[1]
        self.modules = _modules(model, kind)
        self.noise = noise
        self.clean_states: list[Tensor] = []
        self.corrupted_states: list[Tensor] = []
        self.rest: list[tuple | None] = []
        self.cached: list[tuple[Tensor, Tensor]] | None = None

    def clean(self) -> Tensor:
        """The answer's probability; keeps the modules' outputs."""
        with _recording(self.modules) as seen:
            found, _ = next_tokens(self.model, self.ids, 1, max(1, len(self.answer)))
        self.answer = self.answer or [int(found[0, -1].argmax())]
        self.clean_states = [_states(output).reshape(len(self.ids), -1) for (output,) in seen]
        return self._chance(found)[0]

    def corrupted(self) -> Tensor:
        """The answer's probability in every copy `[samples]`; keeps the layers' outputs, keys and values."""
        chances, caches = [], []
        with _recording(self.layers) as seen:
            for copies in torch.arange(len(self.noise), device="cpu").split(self._rows(len(self.ids))):
                with self._corrupting(copies, 0):
                    found, cache = self._answer(self.ids, len(copies), use_cache=True)
                chances.append(found)
                caches.append(keys_and_values(cache, len(self.layers), len(copies), len(self.ids)))
        self.corrupted_states = [torch.cat([_states(output) for output in outputs]) for outputs in seen]
        self.rest = [outputs[0][1:] if isinstance(outputs[0], tuple) else None for outputs in seen]
        if None not in caches:
            by_layer = zip(*caches, strict=True)
            self.cached = [tuple(map(torch.cat, zip(*layer, strict=True))) for layer in by_layer]
        return torch.cat(chances)

    def restored(self, window: int, progress: Progress | None = None) -> Tensor:
        """The answer's mean probability with each cell restored `[tokens from the subject on, layers]`."""
        samples, depth = len(self.noise), len(self.layers)
        effects = torch.empty(self.prompt - self.first, depth, dtype=torch.float32, device="cpu")
        done = 0
        for token in range(self.first, self.prompt):
            prefix = 0 if self.cached is None else token
            batch = self._rows(len(self.ids) - prefix)
            for layers in torch.arange(depth, device="cpu").split(max(1, batch // samples)):
                chances = []
                for rows in torch.arange(len(layers) * samples, device="cpu").split(batch):
                    layer, copies = layers[rows // samples], rows % samples
                    chances.append(self._chances(token, layer, copies, window, prefix))
                    done += len(rows)
                    if progress:
                        progress(f"trace {self.kind}", done // samples, effects.numel())
                effects[token - self.first, layers] = torch.cat(chances).view(-1, samples).mean(-1)
        return effects

    def _answer(self, ids: list[int], rows: int, **inputs) -> tuple[Tensor, object]:
        """The answer's probability after copies of a text that ends before its last token `[rows]`."""
        found, cache = next_tokens(self.model, ids, rows, len(self.answer), **inputs)
        return self._chance(found), cache

    def _chance(self, found: Tensor) -> Tensor:
        """The answer's probability `[rows]` by those of all tokens in its places."""
        answer = torch.tensor(self.answer, device=found.device)[None, :, None]
        return found.gather(-1, answer.expand(len(found), -1, 1))[..., 0].prod(-1).cpu()

    def _chances(self, token: int, layer: Tensor, copies: Tensor, window: int, prefix: int) -> Tensor:
        """The answer's probability in each row, in one pass over what follows the prefix `[rows]`."""
        # The first layer that each must run: those below give what they gave in the corrupted run.
        start = layer + 1 if self.kind == "hidden" else (layer - window // 2).clamp(min=0)
        with (
            self._corrupting(copies, prefix),
            self._entering(start, copies, prefix),
            self._restoring(token, layer, start, window, prefix),
        ):
            inputs = self._cache(start, copies, prefix)
            return self._answer(self.ids[prefix:], len(copies), **inputs)[0]

    def _rows(self, tokens: int) -> int:
        """How many rows of that length share a pass."""
        device = input_device(self.model).type
        return self.batch or max(1, TOKENS.get(device, TOKENS["cpu"]) // tokens)

    def _corrupting(self, copies: Tensor, prefix: int) -> AbstractContextManager[None]:
        """Add the noise of these copies, in a pass that begins after a prefix of so many tokens."""

        def corrupt(_module, _arguments, output):
            noised = output.clone()
            noise = self.noise[copies, max(0, prefix - self.first) :].to(noised)
            begin = max(0, self.first - prefix)
            noised[:, begin : begin + noise.shape[1]] += noise
            return noised

        return capture(after={self.model.get_input_embeddings(): corrupt})

    @contextmanager
    def _entering(self, start: Tensor, copies: Tensor, prefix: int) -> Iterator[None]:
        """Append each row to the batch at the layer `start` that it begins with; `start` never falls."""
        first = int(start[0])
        heads = getattr(self.model.config.get_text_config(), "num_attention_heads", 1)
        narrowing, appending = {}, {}
        for number, layer in enumerate(self.layers[first:], first):
            rows = int((start <= number).sum())
            if rows < len(start):
                narrowing[layer] = _narrow(len(start), rows, heads)
                appending[layer] = _append(
                    self._corrupted_state(number + 1, copies[start == number + 1], prefix)
                )
        with ExitStack() as stack:
            if first > 0:
                states = self._corrupted_state(first, copies[start == first], prefix)
                stack.enter_context(replaying(self.layers[:first], states, self.rest[first - 1]))
            stack.enter_context(capture(before=narrowing, after=appending))
            yield

    def _corrupted_state(self, layer: int, copies: Tensor, prefix: int) -> Tensor:
        """What enters a layer in the corrupted run, after the prefix."""
        states = self.corrupted_states[layer - 1]
        return states[copies.to(states.device), prefix:]

    def _restoring(
        self, token: int, layer: Tensor, start: Tensor, window: int, prefix: int
    ) -> AbstractContextManager[None]:
        """Restore, in every row, the clean outputs at a token in the window of layers around its own."""
        below = layer - window // 2
        grafts = {}
        for number in range(max(0, int(below.min())), min(len(self.modules), int(below.max()) + window)):
            # A layer's output has the rows that begin after it.
            entered = start <= (number + 1 if self.kind == "hidden" else number)
            reached = ((below <= number) & (number < below + window))[entered]
            grafts[self.modules[number]] = _graft(
                reached[:, None], token - prefix, self.clean_states[number][token]
            )
        return capture(after=grafts)

    def _cache(self, start: Tensor, copies: Tensor, prefix: int) -> dict:
        """The corrupted copies' keys and values of the prefix, as the model takes them."""
        if prefix == 0:
            return {}
        pairs = []
        for number, tensors in enumerate(self.cached):
            # The model asks its first layer, which may not run, how many tokens went before.
            mine = copies[start <= max(number, int(start[0]))]
            pairs.append([tensor[mine.to(tensor.device), :, :prefix] for tensor in tensors])
        return cache_inputs(self.model, filled_cache(pairs))


def _narrow(whole: int, rows: int, heads: int) -> Callable:
    """A forward pre-hook that cuts a layer's inputs for `whole` rows to the first `rows`."""

    def narrow(given):
        if isinstance(given, tuple):
            return tuple(map(narrow, given))
        if not isinstance(given, Tensor) or given.dim() < 2:
            return given
        # Some models (BLOOM) have one entry a row and head.
        count = {whole: rows, whole * heads: rows * heads}.get(len(given))
        return given if count is None else given[:count]

    def hook(_module, arguments, keywords):
        return narrow(arguments), {name: narrow(given) for name, given in keywords.items()}

    return hook


def _append(entering: Tensor) -> Callable:
    """A forward hook that appends rows to a layer's output."""

    def hook(_module, _inputs, output):
        states = torch.cat([_states(output), entering.to(_states(output).device)])
        return (states, *output[1:]) if isinstance(output, tuple) else states

    return hook


def _graft(rows: Tensor, token: int, clean: Tensor) -> Callable:
    """A forward hook that puts `clean [width]` at a token, in the rows that `rows [rows, 1]` marks."""

    def hook(_module, _inputs, output):
        states = _states(output)
        # Some models (OPT) flatten [rows, tokens, width] before their MLP.
        grafted = states.reshape(len(rows), -1, states.shape[-1]).clone()
        grafted[:, token] = torch.where(rows.to(grafted.device), clean, grafted[:, token])
        grafted = grafted.view(states.shape)
        return (grafted, *output[1:]) if isinstance(output, tuple) else grafted

    return hook


@contextmanager
def _recording(modules: Iterable[nn.Module]) -> Iterator[list[list]]:
    """Yield, for each module, the list of its outputs during the block."""
    outputs: dict[nn.Module, list] = {module: [] for module in modules}

    def record(module, _arguments, output):
        outputs[module].append(output)

    with capture(after=dict.fromkeys(outputs, record)):
        yield list(outputs.values())


def _states(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _modules(model: nn.Module, kind: str) -> list[nn.Module]:
    """The module of each layer whose output is restored."""
    layers = decoder_layers(model)[1]
    if kind == "hidden":
        return list(layers)
    if kind == "mlp":
        return [mlp_output(model, number) for number in range(len(layers))]
    return [_attention(layer, number) for number, layer in enumerate(layers)]


def _attention(block: nn.Module, number: int) -> nn.Module:
    """The attention module of a layer: the child of that name that has modules of its own, unlike a norm."""
    found = {
        name: child
        for name, child in block.named_children()
        if any(word in f"{name} {type(child).__name__}".lower() for word in ("attn", "attention"))
        and any(True for _ in child.children())
    }
    if len(found) != 1:
        got = ", ".join(found) or "none"
        raise EngramError(f"model: expected one attention module in layer {number}, got {got}")
    (module,) = found.values()
    if takes(module, "residual"):
        # It adds what came before it (BLOOM): what attention itself gives is its last projection's output.
        return [child for child in module.children() if getattr(child, "weight", None) is not None][-1]
    return module


def next_tokens(
    model: nn.Module, ids: list[int], rows: int, count: int = 1, **inputs
) -> tuple[Tensor, object]:
    """The probabilities at the last places of copies of a text `[rows, count, vocabulary]`, and the cache."""
    device = input_device(model)
    inputs = {"use_cache": False, **inputs}
    if takes(model, "logits_to_keep"):
        inputs["logits_to_keep"] = count
    output = model(input_ids=torch.tensor([ids], device=device).expand(rows, -1), **inputs)
    return output.logits[:, -count:].float().softmax(-1), output_cache(output)
