"""Make the edits of `edits_that_take.py`, one method a run, and keep each as low-rank factors.

    python bench/take_edits.py --method plain --output out
    ENGRAM_EASYEDIT=../EasyEdit python bench/take_edits.py --method easyedit-rome --output out
    python bench/take_edits.py --method plain --by natural --label gradients --output out
    python bench/take_edits.py --method plain --values warm --label warm --output out
    python bench/take_edits.py --method plain --layer 4 --layer 5 --layer 6 --label spread --output out
    PYTHONPATH=../older-checkout python bench/take_edits.py --method plain --label older --output out

A run that was cut off goes on by the same command. `out/LABEL/ROW.safetensors` holds, for each weight that is
written, `NAME.left [out, n]` and `NAME.right [n, in]`; its metadata the seconds, by the clock and of the
processor.
Statistics and context texts are there before the clock starts.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import checkouts
import torch
import typer
from safetensors.torch import load_file, save_file
from take_rows import TakeRow, read_take_rows

import engram_kernels as ek
from engram_kernels.editing import Edit, Editor, load_model
from engram_kernels.editing.statistics.npz import save_npz
from engram_kernels.hf.projection import default_layer

EASYEDIT = "easyedit-rome"
Factors = dict[str, torch.Tensor]
GIVEN = {
    "plain": lambda row: {},
    "three given": lambda row: {"paraphrases": list(row.given)},
    "question and chat given": lambda row: {
        "paraphrases": [*row.given, row.given_question, [{"role": "user", "content": row.given_chat}]]
    },
}


def editor_method(
    model, tokenizer, given: Callable[[TakeRow], dict], by: str, **options
) -> Callable[[TakeRow], Callable]:
    """`Editor.edit` by its defaults; what it returns gives the factors, off the clock."""
    editor = Editor(model, tokenizer)
    editor.covariances(options.get("layers") or editor.layers(by))
    editor.prefixes()

    def edit(row: TakeRow):
        fact = Edit(row.subject, row.prompt, row.target, **given(row))
        result = editor.edit(fact, method=by, **options)

        def factors() -> Factors:
            result.revert()
            with tempfile.TemporaryDirectory() as folder:
                result.save_pretrained(folder)
                parts = load_file(Path(folder, "adapter_model.safetensors"))
            kinds = {"lora_A.weight": "right", "lora_B.weight": "left"}
            return {
                f"{name.removeprefix('base_model.model.').removesuffix(part)}weight.{kind}": tensor.float()
                for name, tensor in parts.items()
                for part, kind in kinds.items()
                if name.endswith(part)
            }

        return factors

    return edit


def easyedit_rome(model, tokenizer, accelerated: bool) -> Callable[[TakeRow], Callable]:
    """EasyEdit's ROME by its settings for a Llama, on the editor's layer, statistics and contexts.

    Accelerated it is the same computation, in less time; what it takes then says nothing of EasyEdit's own.
    """
    from bench_integrations import NAMES, SAMPLES, SETTINGS, Algorithm, second_moment

    editor, layer = Editor(model, tokenizer), default_layer(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    model.config._name_or_path = "bench"
    model.requires_grad_(False)
    prefixes = [prefix.replace("{", "").replace("}", "") for prefix in editor.prefixes()]
    moment = second_moment(editor, [layer])[layer]
    folder = tempfile.mkdtemp()
    names = NAMES["smollm2"]
    module = names["rewrite_module_tmp"].format(layer)
    path = Path(folder, "bench", "wikipedia_stats", f"{module}_float32_mom2_{SAMPLES}.npz")
    save_npz(path, moment * 1000, 1000, sample_size=SAMPLES)
    rome = Algorithm(
        "rome", **SETTINGS, **names, stats_dir=folder, v_num_grad_steps=25, layers=[layer],
        v_loss_layer=model.config.num_hidden_layers - 1, context_template_length_params=[],
    )  # fmt: skip
    rome.main.CONTEXT_TEMPLATES_CACHE = ["{}", *(f"{prefix}. {{}}" for prefix in prefixes)]

    def library():
        return ek.integrations.accelerate("easyeditor") if accelerated else contextlib.nullcontext()

    def edit(row: TakeRow):
        request = {
            "case_id": row.number,
            "prompt": row.prompt,
            "subject": row.subject,
            "target_new": row.target,
        }
        with contextlib.redirect_stdout(io.StringIO()), library():
            deltas = rome.execute(model, tokenizer, request, rome.settings)

        def factors() -> Factors:
            found = {}
            for name, (left, right) in deltas.items():
                found[f"{name}.left"] = left.detach().float()[:, None]
                found[f"{name}.right"] = right.detach().float()[None]
            shape = model.get_parameter(next(iter(deltas))).shape
            # ROME's vectors come as (in, out) where the matrix is stored the other way round.
            if (left.numel(), right.numel()) != tuple(shape):
                found = {
                    f"{name}.{side}": tensor.T.contiguous()
                    for name in deltas
                    for side, tensor in (
                        ("left", found[f"{name}.right"]),
                        ("right", found[f"{name}.left"]),
                    )
                }
            return found

        return factors

    return edit


def main(
    method: Annotated[str, typer.Option(help=f"{', '.join(GIVEN)} or easyedit-rome.")],
    output: Annotated[Path, typer.Option(help="A folder; each method has its own in it.")],
    label: Annotated[str | None, typer.Option(help="The folder's name; default: the method.")] = None,
    model: Annotated[str, typer.Option(help="A name that engram knows, or a folder.")] = "smollm2",
    rows: Annotated[int | None, typer.Option(help="The first so many; default: all.")] = None,
    by: Annotated[str, typer.Option(help="The editor's method.")] = "engram",
    values: Annotated[str | None, typer.Option(help="How it finds answers; default: by method.")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Written layers; default: the method's.")] = None,
    accelerated: Annotated[bool, typer.Option("--accelerated", help="EasyEdit's by `accelerate`.")] = False,
) -> None:
    wanted = read_take_rows()[:rows]
    folder = (output / (label or method.replace(" ", "-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    network, tokenizer = load_model(model)
    with checkouts.checkout("easyeditor") if method == EASYEDIT else contextlib.nullcontext():
        if method == EASYEDIT:
            edit = easyedit_rome(network, tokenizer, accelerated)
        else:
            options = {name: one for name, one in (("values", values), ("layers", layer)) if one}
            edit = editor_method(network, tokenizer, GIVEN[method], by, **options)
        for row in wanted:
            path = folder / f"{row.number}.safetensors"
            if path.exists():
                continue
            clock, processor = time.perf_counter(), time.process_time()
            factors = edit(row)
            seconds = {"seconds": time.perf_counter() - clock, "processor": time.process_time() - processor}
            print(json.dumps({"row": row.number, **seconds}), flush=True)
            if accelerated:
                seconds = {}
            temporary = path.with_suffix(f".{os.getpid()}")
            save_file(factors(), temporary, {name: str(value) for name, value in seconds.items()})
            temporary.replace(path)


if __name__ == "__main__":
    typer.run(main)
