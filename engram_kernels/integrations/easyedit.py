"""EasyEdit's methods behind the face of an editor, to be measured on the same cases."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy
import torch

from ..editing.statistics.corpus import read_texts, wikipedia_file
from ..editing.statistics.npz import save_npz
from ..errors import EngramError
from ..hf.layers import decoder_layers
from ..hf.placement import input_device
from ..hf.projection import output_projection
from .wise import TextByText, unrelated_text

if TYPE_CHECKING:
    from ..editing import Edit, Editor

SAMPLES = 100
# Of EasyEdit's settings for a Llama (hparams/), but for the layers, which are the editor's.
SEARCH = {
    "fact_token": "subject_last", "v_lr": 0.5, "v_weight_decay": 1e-3, "clamp_norm_factor": 4,
    "kl_factor": 0.0625, "v_num_grad_steps": 25, "mom2_adjustment": True, "mom2_dataset": "wikipedia",
    "mom2_n_samples": SAMPLES, "mom2_dtype": "float32",
}  # fmt: skip
FINE_TUNING = {
    "num_steps": 25, "lr": 5e-4, "weight_decay": 0.0, "kl_factor": 0.0, "norm_constraint": False,
    "objective_optimization": "prompt_last", "batch_size": 1,
}  # fmt: skip
GRACE = {
    "edit_lr": 1.0, "n_iter": 50, "eps": 1.0, "dist_fn": "euc", "val_init": "cold", "val_train": "sgd",
    "val_reg": "None", "reg": "early_stop", "replacement": "replace_last", "eps_expand": "coverage",
    "num_pert": 8, "dropout": 0.0,
}  # fmt: skip
# Those for Llama 3 8B: with those for Llama 2 an edit's own prompt stays below the threshold on SmolLM2.
WISE = {
    "edit_lr": 0.9, "n_iter": 30, "objective_optimization": "only_label", "mask_ratio": 0.2, "alpha": 2.0,
    "beta": 20.0, "gamma": 10.0, "act_ratio": 0.5, "save_freq": 500, "merge_freq": 1000, "retrieve": True,
    "replay": False, "merge_alg": "ties", "norm_constraint": 1.0, "weights": 1.0, "densities": 0.53,
}  # fmt: skip
WISE_DEPTH = 29 / 32
# Of a corpus, so many texts are there for a method to choose from.
UNRELATED = 64
ABSENT = {
    "mend": "EasyEdit's MEND needs a hypernetwork that was trained for this model, which no package carries",
}


@dataclass
class Record:
    """What is known of an edit that another library made: the fact."""

    edit: Edit


@dataclass
class Edited:
    """Edits of another library in a model, until they are reverted."""

    records: list[Record]
    undo: Callable[[], None] = field(repr=False)
    skipped: list = field(default_factory=list)

    def revert(self) -> None:
        """Put the weights and modules back that were there before."""
        self.undo()


class EasyEdit:
    """One of EasyEdit's methods on the model of an editor, with the editor's statistics and contexts.

    Args:
        method: `"rome"`, `"memit"`, `"ft-l"`, `"grace"` or `"wise"`.
        editor: an `Editor`, whose model is edited, and whose layers, covariances and sampled contexts
            EasyEdit gets instead of its own.
        corpus: of the texts whose beginnings WISE is told to leave alone, a file or an iterable of strings;
            None: the Wikipedia articles in the package `gensim`.

    Raises:
        ValueError: the method is another one; of MEND the message says why it is not there.
        EngramError: EasyEdit cannot be imported, or does not know a model built like this one.

    Example:
        >>> baseline = EasyEdit("rome", editor)
        >>> Evaluation(baseline).each(cases)
    """

    def __init__(self, method: str, editor: Editor, corpus: str | os.PathLike | Iterable[str] | None = None):
        check_baseline(f"easyedit:{method}")
        self.method = method
        # Of transformers: `nn.Module` says nothing of its configuration and its embeddings.
        self.model: Any = editor.model
        self.tokenizer = editor.tokenizer
        self.seed = editor.seed
        self._editor = editor
        self._corpus = corpus
        self._folder: tempfile.TemporaryDirectory | None = None
        self._texts: list[str] = []

    def __repr__(self) -> str:
        return f"EasyEdit({self.method!r}, {type(self.model).__name__})"

    def layers(self, method: str = "") -> tuple[int, ...]:
        """The layers that are written: MEMIT's five, WISE's late one, else the editor's one."""
        if self.method == "wise":
            return (int(WISE_DEPTH * len(decoder_layers(self.model)[1])),)
        return self._editor.layers("memit" if self.method == "memit" else "rome")

    def covariances(self, layers: Sequence[int]) -> dict:
        """The editor's, for the methods that use them."""
        return self._editor.covariances(layers) if self.method in ("rome", "memit") else {}

    def prefixes(self) -> list[str]:
        return self._editor.prefixes()

    def edit(self, edits: Iterable[Edit], **options) -> Edited:
        """Write the facts, all at once; what an editor's `edit` takes besides is not EasyEdit's.

        Raises:
            EngramError: EasyEdit fails.
        """
        edits = list(edits)
        apply = _METHODS[self.method]
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            with self._as_it_likes(), contextlib.redirect_stdout(io.StringIO()):
                undo = apply(self, [self._request(number, edit) for number, edit in enumerate(edits)])
        except EngramError:
            raise
        except Exception as error:
            raise EngramError(f"baseline: EasyEdit's {self.method} failed: {error}") from error
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        return Edited([Record(edit) for edit in edits], undo)

    def module(self, path: str):
        """One of EasyEdit's modules.

        Raises:
            EngramError: it cannot be imported.
        """
        try:
            return importlib.import_module(f"easyeditor.models.{path}")
        except ImportError as error:
            raise EngramError(
                f"baseline: expected the package easyeditor, which cannot be imported: {error}"
            ) from None

    def names(self) -> dict[str, str]:
        """How EasyEdit's settings call the parts of this model."""
        stack, layers = decoder_layers(self.model)
        projection = output_projection(self.model, 0).name
        inner, _, last = projection.removeprefix(f"{stack}.0.").rpartition(".")
        parts = dict(self.model.named_modules())
        attention = next(
            (name for name, _ in layers[0].named_children() if "attn" in name or "attention" in name), ""
        )
        base = stack.rpartition(".")[0]
        norm = next(
            (
                f"{base}.{name}"
                for name, _ in parts[base].named_children()
                if "norm" in name or "ln_f" in name
            ),
            "",
        )
        model: Any = self.model
        head, tied = model.get_output_embeddings(), model.get_input_embeddings()
        # A tied head has no name of its own among the parameters.
        head = tied if head.weight is tied.weight else head
        return {
            "rewrite_module_tmp": f"{stack}.{{}}.{inner}.{last}",
            "layer_module_tmp": f"{stack}.{{}}",
            "mlp_module_tmp": f"{stack}.{{}}.{inner}",
            "attn_module_tmp": f"{stack}.{{}}.{attention}",
            "ln_f_module": norm,
            "lm_head_module": next(name for name, part in parts.items() if part is head),
        }

    def settings(self, **more) -> dict:
        """What all methods are told."""
        return {
            "model_name": "engram", "device": str(input_device(self.model)),
            "layers": list(self.layers()), **self.names(), **more,
        }  # fmt: skip

    def statistics(self) -> str:
        """A folder with the second moments of the layers in EasyEdit's format."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory()
            name = self.names()["rewrite_module_tmp"]
            for layer, covariance in self.covariances(self.layers()).items():
                moment = torch.linalg.inv(covariance.inverse()).float()
                file = f"{name.format(layer)}_float32_mom2_{SAMPLES}.npz"
                path = Path(self._folder.name, "engram", "wikipedia_stats", file)
                save_npz(path, moment * 1000, 1000, sample_size=SAMPLES)
        return self._folder.name

    def templates(self) -> list[str]:
        prefixes = (prefix.replace("{", "").replace("}", "") for prefix in self.prefixes())
        return ["{}", *(f"{prefix}. {{}}" for prefix in prefixes)]

    def texts(self) -> list[str]:
        """The first texts of the corpus.

        Raises:
            EngramError: there is none.
        """
        if not self._texts:
            corpus = wikipedia_file() if self._corpus is None else self._corpus
            if corpus is None:
                raise EngramError(
                    f"corpus: expected text that {self.method} leaves alone, or the package gensim with its "
                    "articles, got neither"
                )
            self._texts = list(itertools.islice(read_texts(corpus), UNRELATED))
        return self._texts

    def place(self) -> tuple[torch.nn.Module, str, str]:
        """Where a method puts a module of its own: the parent, the name in it, EasyEdit's for its weight."""
        (layer,) = self.layers()
        path = self.names()["rewrite_module_tmp"].format(layer)
        parent, _, last = path.rpartition(".")
        return self.model.get_submodule(parent), last, re.sub(r"\.(\d+)", r"[\1]", path) + ".weight"

    def _request(self, number: int, edit: Edit) -> dict:
        return {"case_id": number, "prompt": edit.prompt, "subject": edit.subject, "target_new": edit.target}

    @contextlib.contextmanager
    def _as_it_likes(self) -> Iterator[None]:
        """A pad token, padding on the right, and a name, as EasyEdit expects them, for a while."""
        config: Any = self.model.config
        before = SimpleNamespace(
            pad=self.tokenizer.pad_token,
            side=self.tokenizer.padding_side,
            name=config._name_or_path,
        )
        try:
            self.tokenizer.pad_token = before.pad or self.tokenizer.eos_token
            self.tokenizer.padding_side = "right"
            config._name_or_path = "engram"
            yield
        finally:
            self.tokenizer.pad_token, self.tokenizer.padding_side = before.pad, before.side
            config._name_or_path = before.name


def check_baseline(name: str) -> str:
    """The method of a name such as "easyedit:rome".

    Raises:
        ValueError: it is none that can be measured; where there is a reason, the message has it.
    """
    library, _, method = name.partition(":")
    if library != "easyedit" or method not in _METHODS:
        known = ", ".join(f"easyedit:{each}" for each in _METHODS)
        reason = f": {ABSENT[method]}" if library == "easyedit" and method in ABSENT else ""
        raise ValueError(f"baseline: expected one of {known}, got {name!r}{reason}")
    return method


def _rome(editor: EasyEdit, requests: list[dict]) -> Callable[[], None]:
    main = editor.module("rome.rome_main")
    cache = editor.module("rome.compute_u").inv_mom2_cache
    cache.clear()
    settings = editor.settings(
        **SEARCH, alg_name="ROME", stats_dir=editor.statistics(), context_template_length_params=[],
        v_loss_layer=len(decoder_layers(editor.model)[1]) - 1,
    )  # fmt: skip
    main.CONTEXT_TEMPLATES_CACHE = editor.templates()
    return _weights(editor, main.apply_rome_to_model, requests, main.ROMEHyperParams(**settings))


def _memit(editor: EasyEdit, requests: list[dict]) -> Callable[[], None]:
    main = editor.module("memit.memit_main")
    main.COV_CACHE.clear()
    settings = editor.settings(
        **SEARCH, alg_name="MEMIT", stats_dir=editor.statistics(), mom2_update_weight=15000,
        layer_selection="all", v_loss_layer=len(decoder_layers(editor.model)[1]) - 1,
    )  # fmt: skip
    # MEMIT samples five texts of ten tokens.
    main.CONTEXT_TEMPLATES_CACHE = [["{}"], editor.templates()[-5:]]
    return _weights(editor, main.apply_memit_to_model, requests, main.MEMITHyperParams(**settings))


def _ft(editor: EasyEdit, requests: list[dict]) -> Callable[[], None]:
    main = editor.module("ft.ft_main")
    settings = editor.settings(**FINE_TUNING, alg_name="FT")
    settings["rewrite_module_tmp"] += ".weight"
    return _weights(editor, main.apply_ft_to_model, _whole(requests), main.FTHyperParams(**settings))


def _weights(editor: EasyEdit, apply: Callable, requests: list[dict], settings) -> Callable[[], None]:
    """Run a method that writes weights; what it returns puts them back."""
    kept = dict(apply(editor.model, editor.tokenizer, requests, settings, return_orig_weights=True)[1])

    def undo() -> None:
        with torch.no_grad():
            for name, weight in kept.items():
                editor.model.get_parameter(name).copy_(weight)

    return undo


def _grace(editor: EasyEdit, requests: list[dict]) -> Callable[[], None]:
    """GRACE puts a module with a codebook in a layer's place; it knows the prompt's last token only."""
    request = _alone("grace", requests)
    main = editor.module("grace.grace_main")
    owner, last, inner = editor.place()
    original = getattr(owner, last)
    settings = {"model_name": "engram", "device": editor.settings()["device"], "alg_name": "GRACE", **GRACE}
    hyper = main.GraceHyperParams(**settings, inner_params=[inner])

    def undo() -> None:
        setattr(owner, last, original)

    try:
        main.apply_grace_to_model(editor.model, editor.tokenizer, [request], hyper)
    except BaseException:
        undo()
        raise
    adapter = getattr(owner, last)
    # Every text that begins is asked at its own last token.
    adapter.register_forward_pre_hook(_from_the_last_token)
    return undo


def _from_the_last_token(adapter: Any, inputs: tuple) -> None:
    if inputs[0].shape[1] > 1:
        adapter.key_id = -1


def _wise(editor: EasyEdit, requests: list[dict]) -> Callable[[], None]:
    """WISE puts a module in a layer's place, with a second matrix and a rule for which texts it is."""
    request = _alone("wise", requests)
    main, state = editor.module("wise.wise_main"), editor.module("wise.WISE")
    owner, last, inner = editor.place()
    original = getattr(owner, last)
    settings = {"model_name": editor.model.config.model_type, "device": editor.settings()["device"], **WISE}
    hyper = main.WISEHyperParams(**settings, alg_name="WISE", inner_params=[inner])
    # WISE samples ten texts, where an editor has twenty, of the same lengths.
    templates = ["{}", *editor.templates()[1::2]]
    editor.module("wise.utils").CONTEXT_TEMPLATES_CACHE = templates
    # A longer one would shift what WISE takes for the prompts' ends.
    texts = [template.format(f"{request['prompt']} {request['target_new']}") for template in templates]
    longest = max(map(len, editor.tokenizer(texts, add_special_tokens=False)["input_ids"]))
    request["loc_prompt"] = unrelated_text(
        editor.tokenizer, editor.texts(), request["prompt"], request["subject"], longest
    )
    editor.tokenizer.padding_side = "left"
    drawn = numpy.random.get_state()
    numpy.random.seed(editor.seed)
    try:
        main.apply_wise_to_model(editor.model, editor.tokenizer, [request], hyper)
    except BaseException:
        setattr(owner, last, original)
        raise
    finally:
        numpy.random.set_state(drawn)
        state.edit_history.clear()
    chooser = TextByText(getattr(owner, last))
    setattr(owner, last, chooser)
    hook = editor.model.register_forward_pre_hook(chooser.before, with_kwargs=True)

    def undo() -> None:
        hook.remove()
        setattr(owner, last, original)

    return undo


def _alone(method: str, requests: list[dict]) -> dict:
    """The one request of a method that keeps no earlier edit."""
    if len(requests) > 1:
        raise EngramError(f"baseline: expected one fact at a time for EasyEdit's {method}, got several")
    return _whole(requests)[0]


def _whole(requests: list[dict]) -> list[dict]:
    return [{**each, "prompt": each["prompt"].replace("{}", each["subject"])} for each in requests]


_METHODS: dict[str, Callable[[EasyEdit, list[dict]], Callable[[], None]]] = {
    "rome": _rome,
    "memit": _memit,
    "ft-l": _ft,
    "grace": _grace,
    "wise": _wise,
}
