"""Seconds an edit of EasyEdit's ROME and MEMIT, as they are and accelerated, and how near both are to fp64.

    ENGRAM_EASYEDIT=../EasyEdit python bench/bench_integrations.py --data counterfact_dev.json --rows 10
    ENGRAM_EASYEDIT=../EasyEdit python bench/bench_integrations.py --data counterfact_dev.json --model gpt2

The same rows, context templates and covariances; each row (ROME) or batch of rows (MEMIT) is edited by the
library as it is and then accelerated, or the other way round, in one run; the weights are as before.
Statistics are read from the library's own `.npz` files before the clock starts. For the first `--oracle` rows
and batches the library runs once more, with model and inverse in float64: that is what both are held against.
`--model gpt2` is a random model of GPT-2's shape: for time, not for quality.
"""

import contextlib
import copy
import importlib
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import checkouts
import torch
import typer
from rich.console import Console
from rich.table import Table

import engram_kernels as ek
from engram_kernels._io import new_file
from engram_kernels.editing import Editor, load_model
from engram_kernels.editing.statistics.npz import save_npz

SAMPLES = 100
NAMES = {
    # The head is tied, and has no name of its own among the parameters.
    "smollm2": {**checkouts.NAMES["llama"], "lm_head_module": "model.embed_tokens"},
    "gpt2": checkouts.NAMES["gpt2"],
}
# EasyEdit's own for a Llama of this size (hparams/ROME and hparams/MEMIT), but for the layers.
SETTINGS = {
    "fact_token": "subject_last",
    "v_lr": 0.5,
    "v_weight_decay": 1e-3,
    "clamp_norm_factor": 4,
    "kl_factor": 0.0625,
    "mom2_adjustment": True,
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": SAMPLES,
    "mom2_dtype": "float32",
    "model_name": "bench",
    "device": "cpu",
}


class Algorithm:
    """An algorithm of EasyEdit on one model, with its caches."""

    def __init__(self, name: str, **settings):
        package = f"easyeditor.models.{name}"
        self.main = importlib.import_module(f"{package}.{name}_main")
        self.execute = getattr(self.main, f"execute_{name}")
        self.inverts = name == "rome"
        keys = importlib.import_module(f"{package}.compute_u") if self.inverts else self.main
        self.cache = keys.inv_mom2_cache if self.inverts else keys.COV_CACHE
        kind = getattr(self.main, f"{name.upper()}HyperParams")
        self.settings = kind(alg_name=name.upper(), **settings)

    def run(self, model, tokenizer, requests) -> tuple[dict, float]:
        """The deltas of an edit and its seconds; the model is as before."""
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            deltas = self.execute(model, tokenizer, requests, self.settings)
        return deltas, time.perf_counter() - started


def updates(deltas: dict) -> dict[str, torch.Tensor]:
    """What is added to each matrix, in float64: the product of ROME's vectors or MEMIT's factors."""
    wide = {name: [part.detach().double() for part in parts] for name, parts in deltas.items()}
    return {name: torch.outer(u, v) if u.dim() == 1 else u @ v.T for name, (u, v) in wide.items()}


def distance(deltas: dict, reference: dict) -> float:
    """The largest relative distance of an update to that of the reference."""
    ours, truth = updates(deltas), updates(reference)
    return max(float((ours[name] - truth[name]).norm() / truth[name].norm()) for name in truth)


def second_moment(editor: Editor, layers) -> dict[int, torch.Tensor]:
    """The covariances of some layers as float32, from what the editor collects and keeps."""
    found = editor.covariances(layers)
    return {layer: torch.linalg.inv(found[layer].inverse()).float() for layer in layers}


def random_moment(width: int, layer: int) -> torch.Tensor:
    """A covariance of a condition number of some 1e4, as float32."""
    generator = torch.Generator().manual_seed(layer)
    states = torch.randn(4 * width, width, generator=generator) * torch.logspace(0, -2, width)
    states = states @ torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return states.T @ states / len(states)


def prepare(name: str, tokens: int | None):
    """Model, tokenizer, prefixes and a function that gives the covariances of layers."""
    model, tokenizer = load_model("smollm2")
    editor = Editor(model, tokenizer, tokens=tokens)
    prefixes = editor.prefixes()
    if name == "smollm2":
        return model, tokenizer, prefixes, lambda layers: second_moment(editor, layers)
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=model.config.vocab_size, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    width = 4 * config.n_embd
    return model, tokenizer, prefixes, lambda layers: {at: random_moment(width, at) for at in layers}


def main(
    data: Annotated[Path, typer.Option(help="CounterFact rows, EasyEdit's layout.")],
    model: Annotated[str, typer.Option(help="smollm2, or gpt2: a random one.")] = "smollm2",
    algorithm: Annotated[str, typer.Option(help="rome, memit or both.")] = "both",
    rows: int = 10,
    batch: Annotated[int, typer.Option(help="Rows that MEMIT edits at once.")] = 5,
    steps: Annotated[int, typer.Option(help="Evaluations of the loss, at most.")] = 25,
    oracle: Annotated[int, typer.Option(help="Rows and batches that are also run in float64.")] = 1,
    tokens: Annotated[int | None, typer.Option(help="Of text for the covariances.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for every figure.")] = None,
) -> None:
    folder = os.environ.get("ENGRAM_DATA")
    data = Path(folder) / data if folder and not data.exists() else data
    cases = json.loads(data.read_text(encoding="utf-8"))[:rows]
    requests = [
        {"case_id": number, **{name: case[name] for name in ("prompt", "subject", "target_new")}}
        for number, case in enumerate(cases)
    ]
    for request in requests:
        request["prompt"] = request["prompt"].replace(request["subject"], "{}")
    network, tokenizer, prefixes, moments = prepare(model, tokens)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    network.config._name_or_path = "bench"
    network.requires_grad_(False)
    contexts = ["{}", *(prefix.replace("{", "").replace("}", "") + ". {}" for prefix in prefixes)]
    depth = network.config.num_hidden_layers
    layers = {"rome": [8], "memit": [4, 5, 6, 7, 8]}
    report = []
    with tempfile.TemporaryDirectory() as statistics_folder, checkouts.checkout("easyeditor"):
        common = {
            **SETTINGS, **NAMES[model], "stats_dir": statistics_folder,
            "v_num_grad_steps": steps, "v_loss_layer": depth - 1,
        }  # fmt: skip
        wanted = [name for name in layers if algorithm in (name, "both")]
        covariances = moments(sorted({layer for name in wanted for layer in layers[name]}))
        for layer, covariance in covariances.items():
            name = f"{NAMES[model]['rewrite_module_tmp'].format(layer)}_float32_mom2_{SAMPLES}.npz"
            path = Path(statistics_folder, "bench", "wikipedia_stats", name)
            save_npz(path, covariance * 1000, 1000, sample_size=SAMPLES)
        if "rome" in wanted:
            rome = Algorithm(
                "rome", **common, layers=layers["rome"], context_template_length_params=[]
            )  # fmt: skip
            rome.main.CONTEXT_TEMPLATES_CACHE = contexts
            report += compare("rome", rome, network, tokenizer, requests, covariances, oracle)
        if "memit" in wanted:
            memit = Algorithm(
                "memit", **common,
                layers=layers["memit"], layer_selection="all", mom2_update_weight=15000,
            )  # fmt: skip
            # MEMIT samples five texts of ten tokens.
            memit.main.CONTEXT_TEMPLATES_CACHE = [contexts[:1], contexts[-5:]]
            batches = [requests[i : i + batch] for i in range(0, len(requests), batch)]
            report += compare("memit", memit, network, tokenizer, batches, covariances, oracle)
    show(report, f"EasyEdit, {model}, float32, cpu, {torch.get_num_threads()} threads")
    if out is not None:
        with new_file(out) as temporary:
            temporary.write_text(json.dumps({"torch": torch.__version__, "rows": report}, indent=2) + "\n")


def compare(
    name: str, algorithm: Algorithm, model, tokenizer, edits: list, covariances: dict, oracle: int
) -> list[dict]:
    """Run every row, or batch of rows, as the library does it and accelerated, one after the other."""
    caches: dict[str, dict] = {"as it is": {}, "accelerated": {}}

    def run(variant: str, rows):
        # Each variant fills a cache of its own, by the library's code.
        algorithm.cache.clear()
        algorithm.cache.update(caches[variant])
        if variant == "as it is":
            outcome = algorithm.run(model, tokenizer, rows)
        else:
            with ek.integrations.accelerate("easyeditor") as report:
                outcome = algorithm.run(model, tokenizer, rows)
            if report.declined:
                raise SystemExit(str(report))
        caches[variant] = dict(algorithm.cache)
        return outcome

    steps, algorithm.settings.v_num_grad_steps = algorithm.settings.v_num_grad_steps, 2
    for variant in caches:
        run(variant, edits[0])
    algorithm.settings.v_num_grad_steps = steps
    report = []
    for number, rows in enumerate(edits):
        count = len(rows) if isinstance(rows, list) else 1
        entry: dict = {"algorithm": name, "number": number, "edits": count}
        found = {}
        # Who goes first changes from row to row.
        for variant in sorted(caches, reverse=number % 2 == 0):
            found[variant], seconds = run(variant, rows)
            entry[variant] = seconds / count
        entry["apart"] = distance(found["accelerated"], found["as it is"])
        if number < oracle:
            truth = in_float64(algorithm, model, tokenizer, rows, covariances)
            entry["error"] = {variant: distance(found[variant], truth) for variant in found}
        report.append(entry)
        print(json.dumps(entry), flush=True)
    return report


def in_float64(algorithm: Algorithm, model, tokenizer, rows, covariances: dict[int, torch.Tensor]) -> dict:
    """The library's own deltas with model, value and inverse in float64."""
    algorithm.cache.clear()
    for layer, covariance in covariances.items():
        name = algorithm.settings.rewrite_module_tmp.format(layer)
        covariance = covariance.double()
        algorithm.cache["bench", name] = torch.linalg.inv(covariance) if algorithm.inverts else covariance
    torch.set_default_dtype(torch.float64)
    try:
        return algorithm.run(copy.deepcopy(model).double(), tokenizer, rows)[0]
    finally:
        torch.set_default_dtype(torch.float32)


def show(report: list[dict], title: str) -> None:
    """The table that closes a run."""
    table = Table(
        "", "rows", "as it is", "accelerated", "ratio", "apart, at most", "error to float64", title=title
    )
    for name in dict.fromkeys(entry["algorithm"] for entry in report):
        entries = [entry for entry in report if entry["algorithm"] == name]
        seconds = {v: [entry[v] for entry in entries] for v in ("as it is", "accelerated")}
        ratios = [slow / fast for slow, fast in zip(*seconds.values(), strict=True)]
        errors = [entry["error"] for entry in entries if "error" in entry]
        worst = {v: max(error[v] for error in errors) for v in seconds} if errors else {}
        table.add_row(
            name,
            str(sum(entry["edits"] for entry in entries)),
            *(f"{statistics.median(each):.2f} s" for each in seconds.values()),
            f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})",
            f"{max(entry['apart'] for entry in entries):.0e}",
            " / ".join(f"{error:.0e}" for error in worst.values()),
        )
    table.caption = (
        "seconds an edit, median; the ratio of pairs: median, lowest, highest; errors: as it is / accelerated"
    )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
