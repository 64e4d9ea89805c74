"""Causal tracing: which states carry a fact (ROME, Meng et al. 2022, 2202.05262, section 2, appendix B)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..errors import EngramError
from ..models.evaluating import evaluating
from ..models.layers import decoder_layers
from .left import keys_and_values
from .passes import replaying, takes
from .structure import mlp_output
from .tokens import Edit, check_length, encode_row

KINDS = ("hidden", "mlp", "attention")
ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)
# In one forward pass, where no batch is asked for.
TOKENS = {"cpu": 1024, "cuda": 16384}
EMBEDDINGS = 4096


@dataclass(frozen=True, eq=False)
class Trace:
    """What restoring one clean state does to an answer, for every token and layer of a prompt.

    Attributes:
        tokens: of the prompt, as text.
        subject: index of the subject's first token, and the one after its last.
        kind: what is restored: `"hidden"`, `"mlp"` or `"attention"`.
        window: over how many layers; 1 for `"hidden"`.
        answer: the token `o` whose probability is measured.
        clean: `p(o)` after the prompt.
        corrupted: its mean over the corrupted copies, nothing restored.
        effects: `[tokens, layers]` float32, the mean `p(o)` with that state restored.
    """

    tokens: tuple[str, ...]
    subject: tuple[int, int]
    kind: str
    window: int
    answer: str
    clean: float
    corrupted: float
    effects: Tensor

    @property
    def indirect_effects(self) -> Tensor:
        """`[tokens, layers]`: by how much restoring that state raises the corrupted probability."""
        return self.effects - self.corrupted

    @property
    def labels(self) -> tuple[str, ...]:
        """The tokens, those of the subject with a star."""
        first, end = self.subject
        return tuple(f"{token}*" if first <= i < end else token for i, token in enumerate(self.tokens))

    def to_dict(self) -> dict:
        """Numbers, strings and lists, as JSON takes them."""
        return _to_dict(self)

    @classmethod
    def from_dict(cls, content: Mapping) -> Trace:
        """The trace that `to_dict` gave.

        Raises:
            ValueError: a field is missing or unknown, or `effects` has not a row for each token.
        """
        return cls(**_from_dict(cls, content, "effects", "tokens"))


@dataclass(frozen=True, eq=False)
class AverageTrace:
    """The average indirect effect over many facts, by what a token is in its prompt.

    Attributes:
        kind: what was restored.
        window: over how many layers.
        facts: how many there were.
        clean: the mean `p(o)` after the prompts.
        corrupted: the same with the subjects corrupted.
        counts: how many tokens there were of each of the six `ROLES`.
        indirect_effects: `[6, layers]` float32, their mean; NaN for a role that no token has.
    """

    kind: str
    window: int
    facts: int
    clean: float
    corrupted: float
    counts: tuple[int, ...]
    indirect_effects: Tensor

    @property
    def labels(self) -> tuple[str, ...]:
        """The roles."""
        return ROLES

    def to_dict(self) -> dict:
        """Numbers, strings and lists, as JSON takes them; None for NaN."""
        return _to_dict(self)

    @classmethod
    def from_dict(cls, content: Mapping) -> AverageTrace:
        """The average that `to_dict` gave.

        Raises:
            ValueError: a field is missing or unknown, or `indirect_effects` has not a row for each role.
        """
        return cls(**_from_dict(cls, content, "indirect_effects", "counts"))


def trace(
    model: nn.Module,
    tokenizer,
    prompt: str,
    subject: str,
    kind: str = "hidden",
    *,
    window: int = 10,
    noise: float = 3.0,
    samples: int = 10,
    target: str | None = None,
    sigma: float | None = None,
    seed: int = 0,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Find which states of a model, restored one at a time, bring a corrupted fact back.

    With the embeddings `e` of the subject's tokens and a clean state `h` of token `i` at layer `l`,

        e* = e + noise · σ · ε,  ε ~ N(0, 1);    IE(i, l) = mean_ε p(o | e*, h restored) − mean_ε p(o | e*)

    The corrupted copies are the same for every cell. What a cell does not change is computed once: the layers
    below the lowest restored one replay the corrupted run, and so do the tokens left of the restored one, by
    attention's keys and values, where the model caches these. A token left of the subject has no effect, as
    corruption does not reach it. The model stays as it is.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.
        prompt: the text before the answer, with one `{}` for the subject, or the subject itself, once.
        subject: what the fact is about.
        kind: what is restored: `"hidden"`, a decoder layer's output; `"mlp"` or `"attention"`, the outputs of
            these modules in the layers of a window.
        window: how many layers it has, `window // 2` of them below its cell; it ends where the model does.
        noise: in multiples of `sigma`.
        samples: corrupted copies.
        target: the first token of this text is `o`; None: the token that the model predicts.
        sigma: standard deviation of the embeddings; None: of the whole vocabulary's. The paper takes it over
            the tokens of many subjects: `embedding_std`.
        seed: of the noise; the global random state is neither used nor changed.
        batch: the most rows in one forward pass, a row being one corrupted copy with one cell restored; None:
            by the length of the prompt and the device.
        progress: called with the cells done and their number.

    Returns:
        A `Trace`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
        EngramError: subject or target has no token, the prompt is longer than the model's context, the model
            predicts NaN, or the modules that `kind` names are not found.

    Example:
        >>> found = trace(*load_model("smollm2"), "{} is located in the city of", "The Eiffel Tower")
        >>> found.indirect_effects.max()
    """
    check.expect(kind in KINDS, "kind", "'hidden', 'mlp' or 'attention'", repr(kind))
    for name, value in (("window", window), ("samples", samples), ("batch", 1 if batch is None else batch)):
        check.integer(name, value)
        check.expect(value >= 1, name, "at least 1", value)
    check.integer("seed", seed)
    check.number("noise", noise, at_least=0)
    if sigma is not None:
        check.number("sigma", sigma, at_least=0)
    ids, span, label = _encode(model, tokenizer, prompt, subject, target)
    with evaluating(model), torch.no_grad():
        embedding = model.get_input_embeddings()
        if sigma is None:
            sigma = _std(embedding, torch.arange(embedding.weight.shape[0]))
        generator = torch.Generator().manual_seed(seed)
        shape = (samples, span[1] - span[0], embedding.weight.shape[-1])
        runs = _Runs(
            model, kind, ids, span[0], noise * sigma * torch.randn(shape, generator=generator),
            batch,
        )  # fmt: skip
        chances = runs.clean()
        label = int(chances.argmax()) if label is None else label
        corrupted = runs.corrupted(label)
        if not (check.is_finite(chances) and check.is_finite(corrupted)):
            raise EngramError(f"model: expected finite predictions after {tokenizer.decode(ids)!r}, got NaN")
        restored = runs.restored(label, 1 if kind == "hidden" else window, progress)
    effects = corrupted.mean().repeat(len(ids), len(runs.layers))
    effects[span[0] :] = restored
    answer = tokenizer.decode([label])
    return Trace(
        tokens=tuple(tokenizer.decode([token]) for token in ids),
        subject=span,
        kind=kind,
        window=1 if kind == "hidden" else window,
        answer=answer.strip() or answer,
        clean=chances[label].item(),
        corrupted=corrupted.mean().item(),
        effects=effects,
    )


def embedding_std(model: nn.Module, tokenizer, subjects: Iterable[str]) -> float:
    """The standard deviation of the embeddings of the subjects' tokens, the paper's `σ`.

    Raises:
        TypeError: a subject is not a string.
        EngramError: the subjects have no token.
    """
    check.expect(not isinstance(subjects, str), "subjects", "a list of strings", "str", TypeError)
    ids: list[int] = []
    for subject in subjects:
        check.expect(isinstance(subject, str), "subjects", "strings", type(subject).__name__, TypeError)
        ids += tokenizer(subject, add_special_tokens=False)["input_ids"]
    if not ids:
        raise EngramError("subjects: expected at least one token, got none")
    return _std(model.get_input_embeddings(), torch.tensor(ids))


def known(model: nn.Module, tokenizer, row: Mapping[str, str]) -> bool:
    """Whether the model's next token after `row["prompt"]` is the first one of `row["attribute"]`.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        row: a fact: `prompt`, `subject` and `attribute`.

    Raises:
        ValueError: one of these is missing, or the prompt does not name the subject exactly once.
        EngramError: subject or attribute has no token, or the prompt is longer than the model's context.
    """
    missing = [name for name in ("prompt", "subject", "attribute") if name not in row]
    check.expect(not missing, "row", "prompt, subject and attribute", f"none of the name {missing}")
    ids, _, label = _encode(model, tokenizer, row["prompt"], row["subject"], row["attribute"])
    with evaluating(model), torch.no_grad():
        return int(_next_token(model, ids, 1)[0][0].argmax()) == label


def average(traces: Iterable[Trace]) -> AverageTrace:
    """The average indirect effect by role of the token and layer (the paper's figure 2).

    Every token counts alike. A token may have two roles, as in the paper: the only token of a subject is its
    first and its last, and the only one after a subject is the first subsequent and the last.

    Args:
        traces: of facts that the model knows (`known`), all of one kind, window and depth.

    Raises:
        ValueError: there is none, or they differ in kind, window or depth.
    """
    traces = list(traces)
    check.expect(len(traces) > 0, "traces", "at least one", "none")
    shapes = {(found.kind, found.window, found.effects.shape[1]) for found in traces}
    check.expect(len(shapes) == 1, "traces", "one kind, window and number of layers", sorted(shapes))
    rows: dict[str, list[Tensor]] = {role: [] for role in ROLES}
    for found in traces:
        effects, (first, end) = found.indirect_effects, found.subject
        parts = (
            effects[first : first + 1],
            effects[first + 1 : end - 1],
            effects[end - 1 : end],
            effects[end : end + 1],
            effects[end + 1 : -1],
            effects[-1:],
        )
        for role, part in zip(ROLES, parts, strict=True):
            rows[role].append(part)
    together = [torch.cat(parts) for parts in rows.values()]
    return AverageTrace(
        kind=traces[0].kind,
        window=traces[0].window,
        facts=len(traces),
        clean=sum(found.clean for found in traces) / len(traces),
        corrupted=sum(found.corrupted for found in traces) / len(traces),
        counts=tuple(map(len, together)),
        indirect_effects=torch.stack([part.mean(0) for part in together]),
    )


def best_layer(average: AverageTrace) -> int:
    """The layer whose MLPs, restored at the last subject token, bring back most: where ROME writes.

    Raises:
        ValueError: the average is not one of MLPs.
    """
    check.expect(average.kind == "mlp", "average", "one of kind 'mlp'", repr(average.kind))
    return int(average.indirect_effects[ROLES.index("last subject token")].argmax())


class _Runs:
    """The runs of one trace: clean, corrupted, and corrupted with states restored.

    Args:
        model: in evaluation mode, under `no_grad`.
        kind: what is restored.
        ids: the prompt's tokens.
        first: the subject's first token.
        noise: `[samples, subject tokens, width]`.
        batch: the most rows in one forward pass; None: by the number of tokens.
    """

    def __init__(
        self, model: nn.Module, kind: str, ids: list[int], first: int, noise: Tensor, batch: int | None
    ):
        self.model, self.kind, self.ids, self.first, self.batch = model, kind, ids, first, batch
        self.layers = decoder_layers(model)[1]
        self.modules = _modules(model, kind)
        self.noise = noise
        self.clean_states: list[Tensor] = []
        self.corrupted_states: list[Tensor] = []
        self.rest: list[tuple | None] = []
        self.cached: list[tuple[Tensor, Tensor]] | None = None

    def clean(self) -> Tensor:
        """The probability of every next token `[vocabulary]`; keeps the modules' outputs."""
        with ExitStack() as stack:
            seen = [stack.enter_context(_recording(module)) for module in self.modules]
            chances, _ = _next_token(self.model, self.ids, 1)
        self.clean_states = [_states(output).reshape(len(self.ids), -1) for (output,) in seen]
        return chances[0]

    def corrupted(self, label: int) -> Tensor:
        """The label's probability in every copy `[samples]`; keeps the layers' outputs, keys and values."""
        chances, caches = [], []
        with ExitStack() as stack:
            seen = [stack.enter_context(_recording(layer)) for layer in self.layers]
            for copies in torch.arange(len(self.noise)).split(self._rows(len(self.ids))):
                with self._corrupting(copies, 0):
                    found, cache = _next_token(self.model, self.ids, len(copies), use_cache=True)
                chances.append(found[:, label].cpu())
                caches.append(keys_and_values(cache, len(self.layers), len(copies), len(self.ids)))
        self.corrupted_states = [torch.cat([_states(output) for output in outputs]) for outputs in seen]
        self.rest = [outputs[0][1:] if isinstance(outputs[0], tuple) else None for outputs in seen]
        if None not in caches:
            by_layer = zip(*caches, strict=True)
            self.cached = [tuple(map(torch.cat, zip(*layer, strict=True))) for layer in by_layer]
        return torch.cat(chances)

    def restored(self, label: int, window: int, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """The label's mean probability with each cell restored `[tokens from the subject on, layers]`."""
        samples, depth = len(self.noise), len(self.layers)
        effects = torch.empty(len(self.ids) - self.first, depth)
        done = 0
        for token in range(self.first, len(self.ids)):
            left = 0 if self.cached is None else token
            batch = self._rows(len(self.ids) - left)
            for layers in torch.arange(depth).split(max(1, batch // samples)):
                chances = []
                for rows in torch.arange(len(layers) * samples).split(batch):
                    layer, copies = layers[rows // samples], rows % samples
                    chances.append(self._chances(label, token, layer, copies, window, left))
                    done += len(rows)
                    if progress:
                        progress(done // samples, effects.numel())
                effects[token - self.first, layers] = torch.cat(chances).view(-1, samples).mean(-1)
        return effects

    def _chances(
        self, label: int, token: int, layer: Tensor, copies: Tensor, window: int, left: int
    ) -> Tensor:
        """The label's probability in each of some rows, in one pass from token `left` on `[rows]`."""
        # The first layer that each must run: those below give what they gave in the corrupted run.
        start = layer + 1 if self.kind == "hidden" else (layer - window // 2).clamp(min=0)
        with (
            self._corrupting(copies, left),
            self._entering(start, copies, left),
            self._restoring(token, layer, start, window, left),
        ):
            inputs = self._cache(start, copies, left)
            found, _ = _next_token(self.model, self.ids[left:], len(copies), **inputs)
        return found[:, label].cpu()

    def _rows(self, tokens: int) -> int:
        """How many rows of as many tokens share a pass."""
        device = self.model.get_input_embeddings().weight.device.type
        return self.batch or max(1, TOKENS.get(device, TOKENS["cpu"]) // tokens)

    @contextmanager
    def _corrupting(self, copies: Tensor, left: int) -> Iterator[None]:
        """The noise of these copies, in a pass that begins with token `left`."""

        def corrupt(_module, _inputs, output):
            noised = output.clone()
            noise = self.noise[copies, max(0, left - self.first) :].to(noised)
            begin = max(0, self.first - left)
            noised[:, begin : begin + noise.shape[1]] += noise
            return noised

        hook = self.model.get_input_embeddings().register_forward_hook(corrupt)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _entering(self, start: Tensor, copies: Tensor, left: int) -> Iterator[None]:
        """Every row begins with its layer `start`, which never falls: there it is appended to the batch."""
        first, depth = int(start[0]), len(self.layers)
        with ExitStack() as stack:
            if first > 0:
                states = self._corrupted_state(first, copies[start == first], left)
                stack.enter_context(replaying(self.layers[:first], states, self.rest[first - 1]))
            for number in range(first, depth):
                rows = int((start <= number).sum())
                if rows < len(start):
                    heads = getattr(self.model.config.get_text_config(), "num_attention_heads", 1)
                    hook = _narrowing(len(start), rows, heads)
                    add = self.layers[number].register_forward_pre_hook
                    stack.callback(add(hook, with_kwargs=True).remove)
                    hook = _appending(self._corrupted_state(number + 1, copies[start == number + 1], left))
                    stack.callback(self.layers[number].register_forward_hook(hook).remove)
            yield

    def _corrupted_state(self, layer: int, copies: Tensor, left: int) -> Tensor:
        """What enters a layer in the corrupted run, from token `left` on."""
        states = self.corrupted_states[layer - 1]
        return states[copies.to(states.device), left:]

    @contextmanager
    def _restoring(self, token: int, layer: Tensor, start: Tensor, window: int, left: int) -> Iterator[None]:
        """In every row, the clean outputs at a token of the modules in the window around its layer."""
        below = layer - window // 2
        with ExitStack() as stack:
            for number in range(max(0, int(below.min())), min(len(self.modules), int(below.max()) + window)):
                # A layer's output has the rows that begin after it.
                entered = start <= (number + 1 if self.kind == "hidden" else number)
                reached = ((below <= number) & (number < below + window))[entered]
                hook = _graft(reached[:, None], token - left, self.clean_states[number][token])
                stack.callback(self.modules[number].register_forward_hook(hook).remove)
            yield

    def _cache(self, start: Tensor, copies: Tensor, left: int) -> dict:
        """The corrupted copies' keys and values of the tokens before `left`, as the model takes them."""
        if left == 0:
            return {}
        from transformers import DynamicCache

        cache = DynamicCache()
        for number, tensors in enumerate(self.cached):
            # The model asks its first layer, which may not run, how many tokens went before.
            mine = copies[start <= max(number, int(start[0]))]
            cache.update(*(tensor[mine.to(tensor.device), :, :left] for tensor in tensors), number)
        return {"past_key_values": cache, "use_cache": True}


def _narrowing(whole: int, rows: int, heads: int) -> Callable:
    """A forward pre-hook: of what a layer is given for `whole` rows, that for the first `rows`."""

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


def _appending(entering: Tensor) -> Callable:
    """A forward hook: more rows below those that came."""

    def hook(_module, _inputs, output):
        states = torch.cat([_states(output), entering.to(_states(output).device)])
        return (states, *output[1:]) if isinstance(output, tuple) else states

    return hook


def _graft(rows: Tensor, token: int, clean: Tensor) -> Callable:
    """A forward hook: `clean [width]` at a token, in the rows that `rows [rows, 1]` marks; else what came."""

    def hook(_module, _inputs, output):
        states = _states(output)
        # Some models (OPT) flatten [rows, tokens, width] before their MLP.
        grafted = states.reshape(len(rows), -1, states.shape[-1]).clone()
        grafted[:, token] = torch.where(rows.to(grafted.device), clean, grafted[:, token])
        grafted = grafted.view(states.shape)
        return (grafted, *output[1:]) if isinstance(output, tuple) else grafted

    return hook


@contextmanager
def _recording(module: nn.Module) -> Iterator[list]:
    """Yield the list of what the module gives meanwhile."""
    outputs: list = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


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
    """What gives the attention of a layer: the child of that name with modules of its own, as no norm has."""
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


def _next_token(model: nn.Module, ids: list[int], rows: int, **inputs) -> tuple[Tensor, object]:
    """The next token's probabilities after as many copies of a text `[rows, vocabulary]`, and the cache."""
    device = model.get_input_embeddings().weight.device
    inputs = {"use_cache": False, **inputs}
    if takes(model, "logits_to_keep"):
        inputs["logits_to_keep"] = 1
    output = model(input_ids=torch.tensor([ids], device=device).expand(rows, -1), **inputs)
    return output.logits[:, -1].float().softmax(-1), getattr(output, "past_key_values", None)


def _encode(
    model: nn.Module, tokenizer, prompt: str, subject: str, target: str | None
) -> tuple[list[int], tuple[int, int], int | None]:
    """The prompt's tokens, the first of the subject and the one after its last, and the target's first."""
    # An edit's target is never empty; where none is given, any text lets the rest be checked.
    fact = Edit(subject, prompt, "?" if target is None else target)
    row = encode_row(tokenizer, fact.subject, fact.prompt, "" if target is None else fact.target)
    check_length(model, row, fact)
    first = _first_token(tokenizer, fact, row.ids)
    label = None if target is None else row.ids[row.target]
    return row.ids[: row.target], (min(first, row.subject), row.subject + 1), label


def _first_token(tokenizer, fact: Edit, ids: list[int]) -> int:
    """The index of the subject's first token."""
    start = fact.prompt.index("{}")
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(fact.text, return_offsets_mapping=True)["offset_mapping"]
        return next(i for i, (begin, end) in enumerate(offsets) if end > max(begin, start))
    before = fact.text[:start].rstrip()
    if before:
        return encode_row(tokenizer, before, "{}" + fact.text[len(before) :]).subject + 1
    # Only what the tokenizer itself puts before every text.
    special = tokenizer(fact.text)["input_ids"]
    plain = tokenizer(fact.text, add_special_tokens=False)["input_ids"]
    return next((i for i in range(len(special)) if special[i : i + len(plain)] == plain), 0)


@torch.no_grad()
def _std(embedding: nn.Module, ids: Tensor) -> float:
    """The standard deviation of the entries of these tokens' embeddings, as the model scales them."""
    total = squares = 0.0
    for part in ids.split(EMBEDDINGS):
        rows = embedding(part.to(embedding.weight.device)).double()
        total, squares = total + rows.sum().item(), squares + rows.square().sum().item()
    count = len(ids) * embedding.weight.shape[-1]
    return max(0.0, (squares - total**2 / count) / (count - 1)) ** 0.5


def _to_dict(found: Trace | AverageTrace) -> dict:
    content = {field.name: getattr(found, field.name) for field in fields(found)}
    for name, value in content.items():
        if isinstance(value, Tensor):
            rows = [[None if number != number else number for number in row] for row in value.tolist()]
            content[name] = rows
        elif isinstance(value, tuple):
            content[name] = list(value)
    return content


def _from_dict(cls: type, content: Mapping, table: str, rows: str) -> dict:
    """The fields as `cls` takes them: `table` is its tensor, which has a row for each entry of `rows`."""
    names = {field.name for field in fields(cls)}
    check.expect(set(content) == names, "content", f"the fields {sorted(names)}", sorted(content))
    numbers = [[float("nan") if number is None else number for number in row] for row in content[table]]
    check.expect(
        len(numbers) == len(content[rows]) and len({len(row) for row in numbers}) == 1,
        table,
        f"{len(content[rows])} rows of one length",
        f"{len(numbers)} of the lengths {sorted({len(row) for row in numbers})}",
    )
    lists = {name: tuple(value) for name, value in content.items() if isinstance(value, list)}
    return {**content, **lists, table: torch.tensor(numbers, dtype=torch.float32)}
