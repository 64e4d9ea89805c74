"""Which functions of EasyEdit's, ROME's and MEMIT's packages are replaced, and in which versions."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import _checks as check
from ..errors import EngramError
from .moments import Factor, remembering
from .patching import Acceleration, Replacement, is_accelerated, mark, replacing
from .recognition import Known, known_function
from .states import states_at
from .values import KL_PROMPT, Dialect, compute_v, compute_z

_SEARCH = (
    "Adam TraceDict backward clamp_norm_factor clone config decode detach exp fact_token "
    "find_fact_lookup_idx float functional gather kl_div kl_factor layer_module_tmp log_softmax "
    "logits max mean n_embd nethook nn no_grad norm optim repeat set_requires_grad shape size squeeze "
    "stack step sum tensor torch unsqueeze v_loss_layer v_lr v_num_grad_steps v_weight_decay where "
    "zero_grad zeros"
)
_MOMENT = "_name_or_path config float inverse layer_stats mom2 moment replace torch"
_STRIPS = "bos_token_id unk_token_id"

# By the covariance that a library holds, with which they go; a library may be accelerated many times.
_FACTORS: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True)
class Search:
    """How a library's search for a value is known, and what takes its place."""

    names: str
    parameters: str
    ours: Callable


_SEARCHES = {
    "compute_v": Search(
        "dot get_module_input_output_at_word mlp_module_tmp rewrite_module_tmp",
        "model tok request hparams layer left_vector context_templates",
        compute_v,
    ),
    "compute_z": Search(
        "LookupError T get_parameter lm_head_module ln_f_module new_zeros output vocab_size",
        "model tok request hparams layer context_templates",
        compute_z,
    ),
}
_STATES = Known(
    "Trace input items mean nethook no_grad output shape stack torch",
    "model tok contexts idxs layer module_template track",
)


@dataclass(frozen=True)
class Algorithm:
    """Where an algorithm of a library is, and what is known of it.

    Attributes:
        package: below the library's own.
        main: its module with the steps of an edit.
        value: the function that searches for a value, which has a module of the same name.
        dialect: of that function.
        names: that this one looks up beside those that all do.
        kept: what of `main` is not replaced, and why.
    """

    package: str
    main: str
    value: str
    dialect: Dialect
    names: str = ""
    kept: dict[str, str] = field(default_factory=dict)


_UPSTREAM = Dialect(special_tokens=True, casts=False)
_EASYEDIT = Dialect(strips=True)
_MEMIT_NAMES = f"encode {_STRIPS}"
_R_ROME = Dialect(special_tokens=True, strips=True, averages=True)
_ALPHAEDIT = {
    "execute_AlphaEdit": "its in x in solve is over a sum of all earlier keys",
    "get_cov": "it is asked once, for the projection",
}

# By the module that a package is told by.
LIBRARIES = {
    "models.rome.rome_main": (
        Algorithm("models.rome", "rome_main", "compute_v", Dialect(), "encode"),
        Algorithm(
            "models.r_rome", "r_rome_main", "compute_v", _R_ROME, f"{_STRIPS} enable_random_prefix_keys"
        ),
        Algorithm("models.memit", "memit_main", "compute_z", _EASYEDIT, _MEMIT_NAMES),
        Algorithm("models.emmet", "emmet_main", "compute_z", _EASYEDIT, _MEMIT_NAMES),
        Algorithm("models.alphaedit", "AlphaEdit_main", "compute_z", _EASYEDIT, _MEMIT_NAMES, _ALPHAEDIT),
    ),
    "rome_main": (Algorithm("", "rome_main", "compute_v", _UPSTREAM),),
    "memit_main": (Algorithm("", "memit_main", "compute_z", _UPSTREAM),),
}


def acceleration(module_or_name: ModuleType | str) -> Acceleration:
    """Replace what is known of a library, or nothing: see `engram_kernels.integrations.accelerate`."""
    is_either = isinstance(module_or_name, (ModuleType, str))
    got = type(module_or_name).__name__
    check.expect(is_either, "module_or_name", "a module or its name", got, TypeError)
    library = module_or_name if isinstance(module_or_name, str) else module_or_name.__name__
    named = all(part.isidentifier() for part in library.split("."))
    check.expect(named, "module_or_name", "a module or its name", repr(library), EngramError)
    _imported(library)
    algorithms = next((known for told, known in LIBRARIES.items() if _has(library, told)), ())
    check.expect(
        len(algorithms) > 0, "module_or_name",
        "easyeditor, or the package rome or memit of its repository", repr(library), EngramError,
    )  # fmt: skip
    report = Acceleration(library)
    # All of them are checked before the first is put in place.
    report.replace([each for algorithm in algorithms for each in _replacements(library, algorithm, report)])
    return report


def _imported(module: str) -> ModuleType:
    """A module of a library, whatever its import may raise."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise EngramError(
            f"module_or_name: expected a library that can be imported, got {module!r} "
            f"({type(error).__name__}: {error})"
        ) from error


def _has(library: str, module: str) -> bool:
    try:
        return importlib.util.find_spec(f"{library}.{module}") is not None
    except ModuleNotFoundError:
        return False


def _replacements(library: str, algorithm: Algorithm, report: Acceleration) -> Iterator[Replacement]:
    """What is replaced for an algorithm, all of it checked; notes in the report what is not."""
    package = ".".join(filter(None, (library, algorithm.package)))
    main = _imported(f"{package}.{algorithm.main}")
    home = _imported(f"{package}.{algorithm.value}")
    search = _SEARCHES[algorithm.value]
    names = f"{_SEARCH} {search.names} {algorithm.names}"
    value = known_function(main, algorithm.value, Known(names, search.parameters, (0.05,), KL_PROMPT))
    if is_accelerated(value):
        raise EngramError(
            f"module_or_name: expected a library as it is, got {library!r}, accelerated already"
        )
    _check_helpers(home, algorithm.value)
    ours = search.ours(home, algorithm.dialect)
    yield Replacement(
        main, algorithm.value, replacing(value, ours, report), "runs only what depends on the value"
    )
    tools = home.repr_tools
    states = known_function(tools, "get_reprs_at_idxs", _STATES)
    if is_accelerated(states):
        report.kept[f"{tools.__name__}.get_reprs_at_idxs"] = "replaced by an earlier call already"
    else:
        function = replacing(states, states_at, report)
        yield Replacement(tools, "get_reprs_at_idxs", function, "stops at the layer that is asked for")
    if algorithm.value == "compute_v":
        keys = _imported(f"{package}.compute_u")
        statistics = _imported(f"{package}.layer_stats")
        known_function(keys, "get_inv_cov", Known(f"inv_mom2_cache {_MOMENT}"))
        known_function(statistics, "SecondMoment.moment", Known("count mom2", "self"))
        function = in_double(keys.layer_stats)
        yield Replacement(keys, "layer_stats", function, "get_inv_cov inverts in float64, and then rounds")
        report.kept[f"{keys.__name__}.compute_u"] = "its keys and inverse come from what is replaced"
    elif "get_cov" not in algorithm.kept:
        covariance = known_function(main, "get_cov", Known(f"COV_CACHE {_MOMENT}"))
        function = factored(covariance, main)
        yield Replacement(main, "get_cov", function, "remembers its factor: no in x in solve in float64")
        report.kept[f"{package}.compute_ks.compute_ks"] = "its keys come from what is replaced"
    report.kept[f"{main.__name__}.get_context_templates"] = "sampled once, and kept by the library"
    report.kept |= {f"{main.__name__}.{name}": why for name, why in algorithm.kept.items()}


def _check_helpers(home: ModuleType, value: str) -> None:
    """Make sure of the library's functions that ours calls."""
    names = "decode get_words_idxs_in_templates index repr_tools"
    parameters = "prompt subject tok fact_token_strategy verbose"
    lookup = getattr(home, "find_fact_lookup_idx", None)
    if callable(lookup) and "input_prompt" in inspect.signature(lookup).parameters:
        names, parameters = f"{names} encode", f"{parameters} input_prompt"
    known_function(home, "find_fact_lookup_idx", Known(names, parameters))
    if value == "compute_v":
        names = "detach dict get_reprs_at_idxs get_reprs_at_word_tokens index repr_tools"
        parameters = "model tok layer context_template word module_template fact_token_strategy"
        known_function(home, "get_module_input_output_at_word", Known(names, parameters))


def in_double(layer_stats: Callable) -> Callable:
    """A library's statistics, from its own files and corpora, with the second moment in float64.

    `get_inv_cov` inverts the moment in the type that it has, and rounds the inverse to float32: in float64 it
    loses nothing by that but the rounding.
    """

    @functools.wraps(layer_stats)
    def collected(*arguments, **keywords):
        statistics = layer_stats(*arguments, **keywords)
        statistics.mom2.mom2 = statistics.mom2.mom2.double()
        return statistics

    return mark(collected)


def factored(get_cov: Callable, main: ModuleType) -> Callable:
    """A library's covariance, from its own cache, that remembers its Cholesky factor from call to call."""

    @functools.wraps(get_cov)
    def remembered(model, tok, layer_name, *arguments, **keywords) -> Tensor:
        covariance = get_cov(model, tok, layer_name, *arguments, **keywords)
        # What the library keeps, of which a device gets a new copy in every call.
        held = main.COV_CACHE.get((model.config._name_or_path.replace("/", "_"), layer_name), covariance)
        return remembering(covariance, _FACTORS.setdefault(held, Factor()))

    return mark(remembered)
