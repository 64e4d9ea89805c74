"""Causal tracing: which states carry a fact (ROME, Meng et al. 2022, 2202.05262, section 2, appendix B)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import _checks as check
from .._progress import Progress
from ..errors import EngramError
from ..hf.eval_mode import eval_mode
from ..hf.forward import target_predictions
from ..hf.placement import unwrapped
from ..hf.tokens import (
    Prompt,
    Row,
    chat_text,
    check_apart,
    check_length,
    check_prompt,
    check_text,
    encode_row,
    open_ids,
    prompt_words,
)
from .result import Trace
from .runs import Runs

if TYPE_CHECKING:
    from ..hf.tokens import Tokenizer

KINDS = ("hidden", "mlp", "attention")
# Rows of the embedding matrix that are read at a time.
EMBEDDINGS = 4096


def trace(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: Prompt,
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
    progress: Progress | None = None,
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
        prompt: the text before the answer, with one `{}` for the subject, or the subject itself, once. Or the
            messages of a chat, one of which is such a text.
        subject: what the fact is about.
        kind: what is restored: `"hidden"`, a decoder layer's output; `"mlp"` or `"attention"`, the outputs of
            these modules in the layers of a window.
        window: how many layers it has, `window // 2` of them below its cell; it ends where the model does.
        noise: in multiples of `sigma`.
        samples: corrupted copies.
        target: the answer `o`, to the letter, of which `p(o)` is the probability of all its tokens; None: the
            token that the model predicts.
        sigma: standard deviation of the embeddings; None: of the whole vocabulary's. The paper takes it over
            the tokens of many subjects: `embedding_std`.
        seed: of the noise; the global random state is neither used nor changed.
        batch: the most rows in one forward pass, a row being one corrupted copy with one cell restored; None:
            by the length of the prompt and the device.
        progress: called with "trace" and the kind, the cells done and their number.

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
    row, first = _encode(model, tokenizer, prompt, subject, target)
    ids, answer, span = row.ids[: row.target], row.ids[row.target :], (first, row.subject + 1)
    model = unwrapped(model)
    with eval_mode(model), torch.no_grad():
        embedding = model.get_input_embeddings()
        if sigma is None:
            sigma = _std(embedding, torch.arange(embedding.weight.shape[0], device=embedding.weight.device))
        generator = torch.Generator().manual_seed(seed)
        shape = (samples, span[1] - span[0], embedding.weight.shape[-1])
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        runs = Runs(model, kind, ids, answer, span[0], noise * sigma * drawn, batch)
        clean, corrupted = runs.clean(), runs.corrupted()
        if not (check.is_finite(clean) and check.is_finite(corrupted)):
            raise EngramError(f"model: expected finite predictions after {tokenizer.decode(ids)!r}, got NaN")
        restored = runs.restored(1 if kind == "hidden" else window, progress)
    effects = corrupted.mean().repeat(len(ids), len(runs.layers))
    effects[span[0] :] = restored
    said = tokenizer.decode(runs.answer)
    return Trace(
        tokens=_texts(tokenizer, ids),
        subject=span,
        kind=kind,
        window=1 if kind == "hidden" else window,
        answer=said.strip() or said,
        clean=clean.item(),
        corrupted=corrupted.mean().item(),
        effects=effects,
    )


def embedding_std(model: nn.Module, tokenizer: Tokenizer, subjects: Iterable[str]) -> float:
    """The standard deviation of the embeddings of the subjects' tokens, the paper's `σ`.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        subjects: what the facts are about.

    Returns:
        One number, for `trace(sigma=…)`.

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
    embedding = model.get_input_embeddings()
    return _std(embedding, torch.tensor(ids, device=embedding.weight.device))


def known(model: nn.Module, tokenizer: Tokenizer, row: Mapping[str, str]) -> bool:
    """Whether the model's answer to `row["prompt"]` begins with `row["attribute"]`, by greedy decoding.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        row: a fact: `prompt`, `subject` and `attribute`.

    Returns:
        True where the model knows the fact, and a trace of it means something.

    Raises:
        ValueError: one of these is missing, or the prompt does not name the subject exactly once.
        EngramError: subject or attribute has no token, or the prompt is longer than the model's context.
    """
    missing = [name for name in ("prompt", "subject", "attribute") if name not in row]
    check.expect(not missing, "row", "prompt, subject and attribute", f"none of the name {missing}")
    asked, _ = _encode(model, tokenizer, row["prompt"], row["subject"], row["attribute"])
    model = unwrapped(model)
    with eval_mode(model):
        ((_, likeliest),) = target_predictions(model, [asked])
    return likeliest == asked.ids[asked.target :]


def _encode(model: nn.Module, tokenizer, prompt: Prompt, subject: str, target: str | None) -> tuple[Row, int]:
    """The tokens of prompt and target, and the first one of the subject."""
    subject, prompt = check_prompt(subject, prompt)
    if target is not None:
        check_text("target", target)
    row = encode_row(tokenizer, subject, prompt, target or "")
    text = prompt_words(prompt).replace("{}", subject)
    check_length(model, check_apart(row, text, target or ""), text)
    return row, min(_first_token(tokenizer, subject, prompt), row.subject)


def _texts(tokenizer, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token. Of a character in several tokens the last one has it, the others have `…`."""
    texts, start = [], 0
    for end, token in enumerate(ids, 1):
        text = tokenizer.decode([token])
        if "\ufffd" in text:
            pieces = tokenizer.decode(ids[start:end])
            text = "…" if pieces.endswith("\ufffd") else pieces
        if text != "…":
            start = end
        texts.append(text)
    return tuple(texts)


def _first_token(tokenizer, subject: str, prompt: Prompt) -> int:
    """The index of the subject's first token."""
    special = isinstance(prompt, str)
    template = prompt if special else chat_text(tokenizer, prompt)[0]
    start, text = template.index("{}"), template.replace("{}", subject)
    if getattr(tokenizer, "is_fast", False):
        read = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
        return next(i for i, (begin, end) in enumerate(read["offset_mapping"]) if end > max(begin, start))
    before = text[:start].rstrip()
    if before:
        return encode_row(tokenizer, before, "{}" + text[len(before) :]).subject + 1
    # Only what the tokenizer itself puts before every text.
    return len(open_ids(tokenizer, text)) - len(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def _std(embedding: nn.Module, ids: Tensor) -> float:
    """The standard deviation of the entries of these tokens' embeddings, as the model scales them."""
    total = squares = 0.0
    for part in ids.split(EMBEDDINGS):
        rows = embedding(part).double()
        total, squares = total + rows.sum().item(), squares + rows.square().sum().item()
    count = len(ids) * embedding.weight.shape[-1]
    return max(0.0, (squares - total**2 / count) / (count - 1)) ** 0.5
