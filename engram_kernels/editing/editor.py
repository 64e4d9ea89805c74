"""The editor: what it is given, checked, and the run that writes facts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .. import _checks as check
from .. import tracing
from .._progress import Progress
from .._ranks import Ranks
from ..covariance import Covariance
from ..errors import EngramError
from ..hf.eval_mode import eval_mode
from ..hf.layers import decoder_layers
from ..hf.loading import cache_directory, writable_directory
from ..hf.placement import mirrors, unwrapped, whole_model
from ..hf.projection import default_layer, searched_projection
from .edit import Edit
from .health import check_bounds
from .methods import Method, check_choices, method_of
from .run import Plan, Run
from .saving.journal import Journal
from .saving.result import EditResult
from .search.batching import encode_edit
from .search.prefixes import sample_prefixes
from .search.values import ValueOptions
from .statistics.moments import Moments
from .writing.keys import MeanKey, SpreadKey
from .writing.writing import adds_up

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..hf.tokens import Tokenizer

# What is read to see whether layers can share a change.
PROBE = Edit("It", "{} is", "so")


class Editor:
    """Writes facts into MLP matrices of a causal language model.

    `k [in]` is the averaged key of a subject, `δ [out]` the change of the layer's answer that makes the model
    say the target, `v = k Wᵀ + δ` the value, and `C [in, in]` the second moment of all keys. The write is the
    smallest one, weighted by `C`, after which the layer answers `k` with `v`:

        W ← W + (v − k Wᵀ)ᵀ (k C⁻¹) / (k C⁻¹ kᵀ)

    Args:
        model: a Hugging Face causal language model, float32, bfloat16 or float16.
        tokenizer: its tokenizer.
        corpus: text for `C`: a file or an iterable of strings. None: the Wikipedia articles in the package
            `gensim`, else text sampled from the model.
        cache_dir: where `C` is kept; None: `$ENGRAM_CACHE`, else `~/.cache/engram`.
        tokens: how many tokens of the corpus are used; None: twenty a dimension of the key.
        contexts: the texts sampled before the prompt, as pairs `(tokens, how many)`.
        bare_prompt_weight: the bare prompt's weight in the averaged key; None: all contexts count alike.
            A subject with nothing before it, not even a beginning-of-text token, has a key far from the
            others (cosine 0.4 to 0.7 on SmolLM2), which a weight of one in twenty-one does not reach.
        consistent_key: use the averaged key in the numerator and in the denominator of the write (R-ROME,
            Gupta et al. 2024, arXiv 2403.07175). False: use the bare prompt's key where the original code
            does.
        ridge: added to `C`, as a share of its mean diagonal.
        value: options of the value's optimisation; None: the method's.
        seed: of everything that is sampled; the global random state is neither used nor changed.
        progress: called with the name of a stage, the work done and the work there is.
        group: of torch.distributed: its ranks, each with a replica of the model, share the corpus and the
            values, and all make the same edits. Every rank makes the same calls. None: this process alone.

    Raises:
        EngramError: the model is not a causal language model, or is one of several replicas; or the cache
            cannot be written.
        TypeError, ValueError: an argument is of the wrong kind or out of range.

    Example:
        >>> editor = Editor(*load_model("smollm2"))
        >>> result = editor.edit(Edit("The Eiffel Tower", "{} is located in the city of", "Rome"))
        >>> result.revert()
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Tokenizer,
        *,
        corpus: str | os.PathLike | Iterable[str] | None = None,
        cache_dir: str | os.PathLike | None = None,
        tokens: int | None = None,
        contexts: Sequence[tuple[int, int]] = ((5, 10), (10, 10)),
        bare_prompt_weight: float | None = 0.5,
        consistent_key: bool = True,
        ridge: float = 0.0,
        value: ValueOptions | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        group: ProcessGroup | None = None,
    ):
        _expect("model", model, "a Hugging Face causal language model", torch.nn.Module)
        _expect("cache_dir", cache_dir, "a path or None", str, os.PathLike, type(None))
        _expect("consistent_key", consistent_key, "True or False", bool)
        _expect("value", value, "ValueOptions or None", ValueOptions, type(None))
        check.expect(
            callable(tokenizer), "tokenizer", "the model's tokenizer", type(tokenizer).__name__, TypeError
        )
        if not (progress is None or callable(progress)):
            raise TypeError(f"progress: expected a function or None, got {type(progress).__name__}")
        if tokens is not None:
            check.integer("tokens", tokens, at_least=1)
        if bare_prompt_weight is not None:
            check.number("bare_prompt_weight", bare_prompt_weight, at_least=0)
            check.expect(bare_prompt_weight <= 1, "bare_prompt_weight", "at most 1", bare_prompt_weight)
        check.number("ridge", ridge, at_least=0)
        check.integer("seed", seed)
        # Compiled code does not call hooks; it reads the weights that are edited.
        self.model = model = whole_model(model) if group is None else unwrapped(model)
        decoder_layers(model)
        self.ranks = Ranks(group, mirrors(model))
        self.tokenizer = tokenizer
        self.cache = writable_directory(
            cache_directory(cache_dir), "cache_dir" if cache_dir else "the cache ($ENGRAM_CACHE)"
        )
        self.tokens = tokens
        self.contexts = _pairs(contexts)
        self.bare_prompt_weight = bare_prompt_weight
        self.consistent_key = consistent_key
        self.ridge = ridge
        self.value = value
        self.seed = seed
        self.progress = progress
        self._prefixes: list[str] | None = None
        # By layer, what a probe of it found: the model's code does not change.
        self._adds_up: dict[int, bool] = {}
        self._moments = Moments(
            model, tokenizer, corpus, self.cache, tokens=tokens, ridge=ridge, seed=seed, progress=progress,
            ranks=self.ranks,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"Editor({type(self.model).__name__}, contexts={self.contexts}, ridge={self.ridge:g})"

    def edit(
        self,
        edits: Edit | Iterable[Edit],
        layers: int | Sequence[int] | None = None,
        method: str | Method = "engram",
        *,
        ridge: float | None = None,
        batch: int | None = None,
        preserve: bool | float | None = None,
        null_space: float | None = None,
        conflicts: str = "refuse",
        failures: str = "raise",
        directory: str | os.PathLike | None = None,
        after: EditResult | None = None,
        stop_on: Mapping[str, float] | None = None,
        values: str | None = None,
    ) -> EditResult:
        """Write one fact or many. Whatever fails, the weights stay as they were, bit for bit.

        The methods are one algorithm. The edits are taken in batches; the values of a batch are found in the
        model as it is then, and written at once, exactly or with a ridge, into one layer or spread over
        several.

        | method | layers | batch | ridge λ | source |
        |---|---|---|---|---|
        | `"engram"` | 3 | 100 | 0 | this package: ROME under a key that every text answers to |
        | `"rome"` | 1 | 1 | 0 | Meng et al. 2022, arXiv 2202.05262 |
        | `"emmet"` | 1 | all | 0 | Gupta et al. 2024, arXiv 2403.14236 |
        | `"memit"` | 5 | all | 20 | Meng et al. 2023, arXiv 2210.07229 |
        | `"alphaedit"` | 5 | 100 | 10, in the null space of `C` | Fang et al. 2024, arXiv 2410.02355 |

        docs/methods.md has them all: `"engram-forms"`, `"r-rome"`, `"encore"`, `"rlsedit"`,
        `"evoedit"`, `"betaedit"`, `"nse"`, `"sphere"`, `"simie"`.

        Args:
            edits: the facts.
            layers: indices of the decoder layers, lowest first; None: the one at 0.2 of the depth, and those
                around it over which the method spreads.
            method: one of these, or settings of your own, such as
                `replace(METHODS["encore"], moment=100.0)`.
            ridge: `λ`: how much of each change is given up for smaller writes; None: the method's.
            batch: how many edits are written at once; None: as many as the method does.
            preserve: how much later batches respect the keys of earlier ones: each key counts as much as
                this many samples of the statistics. True: `1/λ`, as in MEMIT's objective, or 1 without a
                ridge; `math.inf`: their answers stay exactly. None: the method's own choice.
            null_space: write only in directions in which the eigenvalue of `C` is at most this share of the
                mean. None: the method's, 0.02 for AlphaEdit, whose own code takes an absolute number. Some
                models have no such directions.
            conflicts: edits of one batch whose texts agree up to the end of the subject have the same key.
                `"refuse"` raises an error; `"last"` makes the last one and skips the others.
            failures: an edit that cannot be made by itself raises an error (`"raise"`), or is listed in the
                result while the rest is done (`"skip"`).
            directory: keeps every value and every batch of this run. After a cut, the same call goes on
                from there, to the same result.
            after: edits that stand in the model already: their keys are preserved as earlier batches are, so
                that a call goes on where another ended. An `EditStore` does this by itself.
            stop_on: bounds, such as `{"perplexity": 0.02, "holding": 0.8}`, of what `Health` measures after
                each batch. The batch that passes one is taken back, it and all later edits are listed as
                skipped, and the edits up to there are kept. None: a run never ends on its health; past wide
                bounds it warns.
            values: how the model's new answers are found. `"search"`: optimised for each edit, in one layer.
                `"gradient"`: no search, a batch is written where a few gradients of all its losses lead,
                in all layers at once (`GradientOptions`). `"warm"`: searched, from where the first
                gradient leads. None: as the method does.

        Returns:
            An `EditResult` with a record for each edit that was made, to revert, save or apply elsewhere.

        Raises:
            TypeError: `edits` holds something else than `Edit`, or an argument is of the wrong kind.
            ValueError: `edits` is empty, or an argument is out of range.
            EngramError: the model cannot be edited there, the corpus is empty, the statistics are singular,
                a prompt is longer than the model's context, edits of a batch conflict or have dependent keys,
                the optimisation is not finite, or the directory is another run's.
        """
        _expect("directory", directory, "a path or None", str, os.PathLike, type(None))
        _expect("after", after, "an EditResult or None", EditResult, type(None))
        plan = self._plan(
            layers, method, ridge, batch, preserve, null_space, conflicts, failures, stop_on, values
        )
        edits = _edits(edits)
        for layer in plan.layers:
            searched_projection(self.model, layer)
        with eval_mode(self.model), self.ranks.failing_together():
            self._check_spread(plan)
            run = Run(self.model, self.tokenizer, edits, plan, self.progress, self.ranks, after)
            run.begin()
            # Gradients are of the prompts alone.
            run.encode(() if plan.method.values == "gradient" else self.prefixes())
            covariances = self.covariances(plan.layers)
            journal = None
            if directory is not None:
                settings = run.settings(covariances)
                # The first rank makes the folder that the others find.
                self.ranks.everyone.decided(lambda: Journal(directory, settings) and None)
                journal = Journal(directory, settings)
            return run.result(covariances, journal)

    def _plan(
        self, layers, method, ridge, batch, preserve, null_space, conflicts, failures, stop_on, values
    ) -> Plan:
        """The method's settings and the caller's, checked."""
        check_choices(method, batch, conflicts, failures, values)
        chosen = method_of(method)
        _expect("ridge", ridge, "a number or None", int, float, type(None))
        _expect("preserve", preserve, "True, False, a number or None", bool, int, float, type(None))
        _expect("null_space", null_space, "a number or None", int, float, type(None))
        ridge = chosen.ridge if ridge is None else ridge
        check.number("ridge", ridge, at_least=0)
        if preserve is not None and preserve != math.inf:
            check.number("preserve", float(preserve), at_least=0)
        asked = {
            "ridge": float(ridge), "preserve": preserve, "null_space": null_space, "batch": batch,
            "values": values,
        }  # fmt: skip
        chosen = replace(chosen, **{name: value for name, value in asked.items() if value is not None})
        _check_gradients(chosen)
        layers = self.layers(method) if layers is None else _asked_layers(layers)
        if (len(layers) > 1 or ridge > 0) and not self.consistent_key:
            raise ValueError(
                "consistent_key: expected True for several layers or a ridge, got False with layers "
                f"{list(layers)} and ridge {ridge:g}"
            )
        return Plan(
            layers=layers,
            method=chosen,
            last_wins=conflicts == "last",
            skip_failures=failures == "skip",
            value=replace(self.value or chosen.value, **({"warm": True} if chosen.values == "warm" else {})),
            key=self._key(chosen),
            texts=chosen.texts,
            forms=chosen.forms,
            shorten=chosen.shorten,
            bare_denominator=not self.consistent_key,
            stop_on=check_bounds(stop_on),
        )

    def _key(self, method: Method) -> MeanKey | SpreadKey:
        if method.key_ridge is not None and self.consistent_key:
            return SpreadKey(method.key_ridge)
        return MeanKey(self.bare_prompt_weight if self.consistent_key else None)

    def layers(self, method: str | Method = "engram") -> tuple[int, ...]:
        """The layers that a method writes where none are asked for.

        One alone where a searched change cannot be spread: without `consistent_key`, or in a model that does
        not add what its MLPs answer to its states as it is.

        Raises:
            ValueError: there is no such method.
        """
        method = method_of(method)
        middle = default_layer(self.model, method.depth)
        first = max(0, middle - method.layers // 2)
        layers = tuple(range(len(decoder_layers(self.model)[1])))[first : first + method.layers]
        if len(layers) == 1 or method.values == "gradient":
            return layers
        if not self.consistent_key:
            return (middle,)
        return layers if self._adds(layers[-1]) else (middle,)

    def _adds(self, layer: int) -> bool:
        """Whether a change of a projection's output is the same change of its layer's output."""
        if layer not in self._adds_up:
            with eval_mode(self.model):
                probe = encode_edit(self.model, self.tokenizer, PROBE, ())
                projection = searched_projection(self.model, layer)
                self._adds_up[layer] = adds_up(self.model, projection, probe)
        return self._adds_up[layer]

    def _check_spread(self, plan: Plan) -> None:
        """A searched change goes over several layers only where they share it by equal parts."""
        if len(plan.layers) > 1 and plan.method.values != "gradient" and not self._adds(plan.layers[-1]):
            name = searched_projection(self.model, plan.layers[-1]).name
            raise EngramError(
                "layers: expected one layer for this model, whose layers do not add the output of "
                f"{name!r} to their own as it is, got several"
            )

    def prefixes(self) -> list[str]:
        """The texts that are put before every prompt, sampled once."""
        if self._prefixes is None:
            with eval_mode(self.model):
                self._prefixes = sample_prefixes(self.model, self.tokenizer, self.contexts, self.seed)
        return self._prefixes

    def covariance(self, layer: int) -> Covariance:
        """The second moment of a layer's keys, inverted: from memory, the cache on disk, or the corpus.

        Raises:
            EngramError: the corpus is empty or too small for the dimension of the key.
        """
        return self.covariances([layer])[layer]

    def covariances(self, layers: Sequence[int], anew: bool = True) -> dict[int, Covariance]:
        """The second moments of several layers' keys, inverted; what is missing comes from one pass.

        Args:
            layers: by index.
            anew: compute again, with a warning, what `cache_dir` holds in a file that is spoilt.

        Raises:
            EngramError: the corpus is empty or too small for the dimension of the key, or a file is spoilt
                and `anew` False.
        """
        with eval_mode(self.model), self.ranks.failing_together():
            return self._moments.covariances(layers, anew)

    def use_covariance(self, layer: int, covariance: Covariance | None) -> None:
        """Take a covariance made elsewhere for a layer, whatever the weights become; None: no longer.

        Raises:
            TypeError, ValueError: it is none, or not of the dimension of the layer's key.
        """
        self._moments.use(layer, covariance)

    def trace(self, prompt: str, subject: str, kind: str = "hidden", **options: Any) -> tracing.Trace:
        """The causal `Trace` of a fact in the model as it is now: `engram_kernels.tracing.trace`.

        Its options are taken, but for `progress`; `seed` is the editor's where none is given.
        """
        options = {"seed": self.seed, **options, "progress": self.progress}
        return tracing.trace(self.model, self.tokenizer, prompt, subject, kind, **options)


def _edits(edits) -> list[Edit]:
    if not isinstance(edits, Iterable | Edit):
        raise TypeError(f"edits: expected an Edit or a list of them, got {type(edits).__name__}")
    edits = [edits] if isinstance(edits, Edit) else list(edits)
    if not edits:
        raise ValueError("edits: expected at least one Edit, got none")
    for edit in edits:
        if not isinstance(edit, Edit):
            raise TypeError(f"edits: expected Edit objects, got {type(edit).__name__}")
    return edits


def _check_gradients(method: Method) -> None:
    """The rule without a rate sums rank-one terms: what methods put around a joint write has no place."""
    around = [name for name in ("neurons", "suppress", "ideal") if getattr(method, name) is not None]
    if method.values == "gradient" and method.gradient.rate is None and around:
        raise ValueError(
            f"values: expected 'search', or a gradient's rate, for a method with {around[0]}, got 'gradient'"
        )


def _asked_layers(layers) -> tuple[int, ...]:
    layers = [layers] if isinstance(layers, int) else layers
    _expect("layers", layers, "an integer or a list of them", Iterable)
    layers = list(layers)
    for layer in layers:
        check.integer("layers", layer)
    in_order = layers == sorted(set(layers)) and layers
    check.expect(bool(in_order), "layers", "different layers, the lowest first", layers)
    return tuple(layers)


def _pairs(contexts) -> tuple[tuple[int, int], ...]:
    """Pairs of a number of tokens and a number of texts."""
    _expect("contexts", contexts, "pairs (tokens, how many)", Iterable)
    contexts = tuple(contexts)
    for pair in contexts:
        whole = isinstance(pair, Sequence) and len(pair) == 2 and all(type(number) is int for number in pair)
        check.expect(whole, "contexts", "pairs of integers (tokens, how many)", repr(pair), TypeError)
        inside = pair[0] >= 1 and pair[1] >= 0
        check.expect(inside, "contexts", "pairs of a positive length and a count", repr(pair))
    return contexts


def _expect(name: str, value: object, expected: str, *kinds: type) -> None:
    """Check a type; True and False are no numbers here."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
