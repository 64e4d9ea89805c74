"""The editor: from facts to rank-one writes (ROME, Meng et al. 2022, arXiv 2202.05262)."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager

import torch

from ..covariance import Covariance
from ..errors import EngramError
from ..functional import rank_one_factors
from ..models.digest import tensor_bytes
from ..models.loading import cache_directory, writable_directory
from . import corpus as corpora
from . import statistics
from .prefixes import sample_prefixes
from .result import EditRecord, EditResult, Write, matrix_checksum, restore, snapshot, write_
from .structure import Projection, default_layer, output_projection
from .tokens import Edit, Row, check_length, encode_row
from .values import Value, ValueOptions, find_value, target_log_probability

TOKENS_PER_DIMENSION = 20


class Editor:
    """Writes facts into one MLP matrix of a causal language model.

    With the averaged key `k [in]` of a subject, the change `δ [out]` of the layer's answer that makes the
    model say the target, the value `v = k Wᵀ + δ`, and the second moment `C [in, in]` of all keys, the write
    is the smallest one, weighted by `C`, after which the layer answers `k` with `v`:

        W ← W + (v − k Wᵀ)ᵀ (k C⁻¹) / (k C⁻¹ kᵀ)

    Args:
        model: a Hugging Face causal language model, float32, bfloat16 or float16.
        tokenizer: its tokenizer.
        corpus: text for `C`: a file or an iterable of strings. None: the Wikipedia articles in the package
            `gensim`, else text sampled from the model.
        cache_dir: where `C` is kept; None: `$ENGRAM_CACHE`, else `~/.cache/engram`.
        tokens: how many tokens of the corpus are used; None: twenty a dimension of the key.
        contexts: the texts sampled before the prompt, as pairs `(tokens, how many)`.
        bare_share: the share of the bare prompt's key in the averaged key; None: all contexts count alike.
            Where nothing stands before the subject, not even a beginning-of-text token, its key is far from
            the others (cosine 0.4 to 0.7 on SmolLM2), and one part in twenty-one does not reach it.
        consistent_key: the same averaged key in the numerator and the denominator of the write (R-ROME, Gupta
            et al. 2024, arXiv 2403.07175); False: the key of the bare prompt where the original code has it.
        ridge: added to `C`, as a share of its mean diagonal.
        value: options of the value's optimisation.
        seed: of everything that is sampled; the global random state is neither used nor changed.
        progress: called with the name of a stage, the work done and the work there is.

    Raises:
        EngramError: the cache cannot be written.
        TypeError, ValueError: an argument is of the wrong kind or out of range.

    Example:
        >>> editor = Editor(*load_model("smollm2"))
        >>> result = editor.edit(Edit("The Eiffel Tower", "{} is located in the city of", "Rome"))
        >>> result.revert()
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer,
        *,
        corpus: str | os.PathLike | Iterable[str] | None = None,
        cache_dir: str | os.PathLike | None = None,
        tokens: int | None = None,
        contexts: Sequence[tuple[int, int]] = ((5, 10), (10, 10)),
        bare_share: float | None = 0.5,
        consistent_key: bool = True,
        ridge: float = 0.0,
        value: ValueOptions | None = None,
        seed: int = 0,
        progress: Callable[[str, int, int], None] | None = None,
    ):
        _expect("model", model, "a Hugging Face causal language model", torch.nn.Module)
        if not callable(tokenizer):
            raise TypeError(f"tokenizer: expected the model's tokenizer, got {type(tokenizer).__name__}")
        _expect("cache_dir", cache_dir, "a path or None", str, os.PathLike, type(None))
        _expect("tokens", tokens, "an integer or None", int, type(None))
        _expect("contexts", contexts, "pairs (tokens, how many)", Iterable)
        contexts = tuple(contexts)
        for pair in contexts:
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise TypeError(f"contexts: expected pairs (tokens, how many), got {pair!r}")
            for number in pair:
                _expect("contexts", number, "pairs of integers", int)
        _expect("bare_share", bare_share, "a number or None", int, float, type(None))
        _expect("consistent_key", consistent_key, "True or False", bool)
        _expect("ridge", ridge, "a number", int, float)
        _expect("value", value, "ValueOptions or None", ValueOptions, type(None))
        _expect("seed", seed, "an integer", int)
        if not (progress is None or callable(progress)):
            raise TypeError(f"progress: expected a function or None, got {type(progress).__name__}")
        if tokens is not None and tokens < 1:
            raise ValueError(f"tokens: expected a positive number, got {tokens}")
        if not (math.isfinite(ridge) and ridge >= 0):
            raise ValueError(f"ridge: expected a finite number of at least 0, got {ridge}")
        if bare_share is not None and not 0 <= bare_share <= 1:
            raise ValueError(f"bare_share: expected a number from 0 to 1 or None, got {bare_share}")
        if any(length < 1 or count < 0 for length, count in contexts):
            raise ValueError(f"contexts: expected pairs of a positive length and a count, got {contexts!r}")
        self.model = model
        self.tokenizer = tokenizer
        self.cache = writable_directory(cache_directory(cache_dir), "cache_dir")
        self.tokens = tokens
        self.contexts = contexts
        self.bare_share = bare_share
        self.consistent_key = consistent_key
        self.ridge = ridge
        self.value = value or ValueOptions()
        self.seed = seed
        self.progress = progress
        self._corpus = corpus
        self._prefixes: list[str] | None = None
        self._ids: torch.Tensor | None = None
        # By layer: the state of the weights that feed it, and what they gave.
        self._covariances: dict[int, tuple[tuple, Covariance]] = {}

    def edit(
        self, edits: Edit | Sequence[Edit], layer: int | None = None, mode: str = "sequential"
    ) -> EditResult:
        """Write one fact or several into a layer. Whatever fails, the weights stay as they were, bit for bit.

        Args:
            edits: the facts.
            layer: index of the decoder layer; None: the one at 0.2 of the depth.
            mode: `"sequential"`: each value is found in the model as edited so far, and written; `"joint"`:
                all values are found in the model as it is, and written at once.

        Returns:
            An `EditResult` with a record for each edit, to revert, save or apply elsewhere.

        Raises:
            TypeError: `edits` holds something else than `Edit`, or `layer` is not an integer.
            ValueError: `edits` is empty, `layer` or `mode` is unknown.
            EngramError: the model cannot be edited there, the corpus is empty, the statistics are singular,
                a prompt is longer than the model's context, joint edits have dependent keys, or the
                optimisation is not finite.
        """
        if not isinstance(edits, Iterable | Edit):
            raise TypeError(f"edits: expected an Edit or a list of them, got {type(edits).__name__}")
        edits = [edits] if isinstance(edits, Edit) else list(edits)
        if not edits:
            raise ValueError("edits: expected at least one Edit, got none")
        for edit in edits:
            if not isinstance(edit, Edit):
                raise TypeError(f"edits: expected Edit objects, got {type(edit).__name__}")
        rows = [
            check_length(self.model, encode_row(self.tokenizer, edit.subject, edit.prompt, edit.target), edit)
            for edit in edits
        ]
        if mode not in ("sequential", "joint"):
            raise ValueError(f"mode: expected 'sequential' or 'joint', got {mode!r}")
        if mode == "joint":
            _check_apart(edits, rows)
        projection = output_projection(self.model, default_layer(self.model) if layer is None else layer)
        with _evaluating(self.model):
            before = self._log_probabilities(edits)
            covariance = self.covariance(projection.layer)
            prefixes = self.prefixes()
            base_checksum, original = matrix_checksum(projection), snapshot(projection)
            try:
                values, writes = [], []
                for group in [[edit] for edit in edits] if mode == "sequential" else [edits]:
                    found = [
                        self._find_value(projection, edit, prefixes, len(values) + i, len(edits))
                        for i, edit in enumerate(group)
                    ]
                    write = self._factors(projection, group, found, covariance)
                    write_(projection, write)
                    if not projection.matrix.isfinite().all():
                        dtype = projection.matrix.dtype
                        raise EngramError(f"edits: expected weights in the range of {dtype}, got infinity")
                    values += found
                    writes.append(write)
                after = self._log_probabilities(edits)
            except BaseException:
                restore(projection, original)
                raise
        records = [
            EditRecord(
                edit=edit,
                layer=projection.layer,
                module=projection.name,
                probability_before=math.exp(log_before),
                probability_after=math.exp(log_after),
                losses=value.losses,
                key_norm=self._key(value).norm().item(),
                value_norm=value.initial_norm,
                change_norm=value.change.norm().item(),
            )
            for edit, value, log_before, log_after in zip(edits, values, before, after, strict=True)
        ]
        return EditResult(
            records=records,
            writes=writes,
            layer=projection.layer,
            module=projection.name,
            base_checksum=base_checksum,
            edited_checksum=matrix_checksum(projection),
            _projection=projection,
            _original=original,
        )

    def prefixes(self) -> list[str]:
        """The texts that are put before every prompt, sampled once."""
        if self._prefixes is None:
            with _evaluating(self.model):
                self._prefixes = sample_prefixes(self.model, self.tokenizer, self.contexts, self.seed)
        return self._prefixes

    def covariance(self, layer: int) -> Covariance:
        """The second moment of a layer's keys, inverted: from memory, the cache on disk, or the corpus.

        Raises:
            EngramError: the corpus is empty or too small for the dimension of the key.
        """
        with _evaluating(self.model):
            projection = output_projection(self.model, layer)
            state = statistics.weights_state(self.model, projection)
            known = self._covariances.get(layer)
            if known is None or known[0] != state:
                count = self.tokens or TOKENS_PER_DIMENSION * projection.matrix.shape[1]
                moment, count = self._moment(projection, count)
                known = state, Covariance.from_second_moment(moment, count, ridge=self.ridge)
                self._covariances[layer] = known
        return known[1]

    def _moment(self, projection: Projection, count: int) -> tuple[torch.Tensor, int]:
        fingerprint = statistics.weights_fingerprint(self.model, projection)
        ids, source = None, f"sampled {count} {self.seed}"
        corpus = self._corpus if self._corpus is not None else corpora.wikipedia_file()
        if corpus is not None:
            # An iterable can be read only once: keep its tokens for the other layers.
            if self._ids is None or (len(self._ids) < count and isinstance(corpus, (str, os.PathLike))):
                self._ids = corpora.token_ids(self.tokenizer, corpora.read_texts(corpus), count)
            ids = self._ids[:count]
            if self.tokens is not None and len(ids) < count:
                warnings.warn(f"corpus: expected {count} tokens, got {len(ids)}", stacklevel=3)
            source = hashlib.sha256(tensor_bytes(ids)).hexdigest()
        key = hashlib.sha256(
            f"{fingerprint} {projection.name} {source} {statistics.CHUNK}".encode()
        ).hexdigest()[:32]
        path = self.cache / "moments" / f"{key}.safetensors"
        cached = statistics.load_moment(path)
        if cached is not None:
            return cached[0].to(projection.matrix.device), cached[1]
        if ids is None:
            ids = corpora.sample_ids(self.model, self.tokenizer, count, self.seed)
        writable_directory(path.parent, "cache_dir")
        moment = statistics.second_moment(self.model, projection, ids, self._stage("statistics"))
        statistics.save_moment(path, moment, len(ids))
        return moment, len(ids)

    def _find_value(self, projection, edit: Edit, prefixes, done: int, total: int) -> Value:
        name = "value" if total == 1 else f"value {done + 1}/{total}"
        return find_value(
            self.model, self.tokenizer, projection, edit, prefixes, self.value, self._stage(name)
        )

    def _key(self, value: Value) -> torch.Tensor:
        """The key `[in]` to which the constraint gives its value."""
        if self.bare_share is None or len(value.keys) == 1:
            return value.keys.mean(0)
        return self.bare_share * value.keys[0] + (1 - self.bare_share) * value.keys[1:].mean(0)

    def _factors(
        self, projection: Projection, edits: list[Edit], values: list[Value], covariance: Covariance
    ) -> Write:
        """The factors of one write that changes the answer to every key by what was found for it."""
        changes = torch.stack([value.change for value in values])
        matrix = projection.matrix
        try:
            if self.consistent_key:
                keys = torch.stack([self._key(value) for value in values])
                # The bias, which stays, is in neither side of the constraint.
                left, right = rank_one_factors(
                    matrix, keys, keys @ matrix.float().T + changes, covariance, mode="joint"
                )
            else:
                keys = torch.stack([value.keys.mean(0) for value in values])
                bare_keys = torch.stack([value.keys[0] for value in values])
                left, right = _original_factors(keys, bare_keys, changes, covariance)
        except (EngramError, torch.linalg.LinAlgError) as error:
            if isinstance(error, EngramError) and not str(error).startswith("keys:"):
                raise
            names = ", ".join(repr(edit.subject) for edit in edits)
            raise EngramError(
                f"edits: expected subjects with linearly independent keys, got dependent ones among {names}"
            ) from error
        if not (left.isfinite().all() and right.isfinite().all()):
            raise EngramError(f"edits: expected finite factors for {projection.name!r}, got NaN or infinity")
        return Write(left, right)

    def _log_probabilities(self, edits: list[Edit]) -> list[float]:
        return [target_log_probability(self.model, self.tokenizer, edit) for edit in edits]

    def _stage(self, name: str) -> Callable[[int, int], None] | None:
        return None if self.progress is None else lambda done, total: self.progress(name, done, total)


def _original_factors(keys, bare_keys, changes, covariance) -> tuple[torch.Tensor, torch.Tensor]:
    """ROME as first published in code: the answers to the bare keys `B` change by `D`.

    W ← W + Dᵀ (P Bᵀ)⁻¹ P,   P = K C⁻¹
    """
    right = covariance.solve(keys).double()
    left = torch.linalg.solve(bare_keys.double() @ right.T, changes.double()).T
    return left.float(), right.float()


def _check_apart(edits: list[Edit], rows: list[Row]) -> None:
    """Two edits whose texts agree up to the end of the subject have one key: it cannot have two values.

    Seen in the tokens, because of rounding such keys differ a little, and would give a huge write.
    """
    seen: dict[tuple[int, ...], Edit] = {}
    for edit, row in zip(edits, rows, strict=True):
        text = tuple(row.ids[: row.subject + 1])
        if text in seen:
            first = seen[text]
            raise EngramError(
                "edits: expected texts that differ up to the end of the subject in joint mode, got "
                f"{first.text!r} and {edit.text!r} with the subjects {first.subject!r} and {edit.subject!r}"
            )
        seen[text] = edit


def _expect(name: str, value: object, expected: str, *kinds: type) -> None:
    """Check a type; True and False are no numbers here."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")


@contextmanager
def _evaluating(model: torch.nn.Module):
    """Off meanwhile: dropout, the caller's autocast, and inference mode, which forbids gradients."""
    training = [(module, module.training) for module in model.modules()]
    kinds = {parameter.device.type for parameter in model.parameters()}
    model.eval()
    try:
        with torch.inference_mode(False), ExitStack() as stack:
            for kind in filter(torch.amp.is_autocast_available, sorted(kinds)):
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        # A module's own flag may differ from the model's, where a part of it is frozen.
        for module, flag in training:
            module.training = flag
