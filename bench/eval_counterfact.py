"""Measure edits on CounterFact rows: do they hold, do they generalise, do they leave other facts alone.

Each row is edited, measured and reverted by itself. Each figure is the fraction of rows in which the mean
log-probability of the whole right answer exceeds that of the other one:

    efficacy     target_new over ground_truth on the edited prompt, after the edit
    paraphrase   the same on the paraphrase
    locality     locality_ground_truth over target_new on a prompt about another subject, before and after

    python bench/eval_counterfact.py --rows 20
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from engram_kernels.editing import Edit, Editor, load_model
from engram_kernels.editing.tokens import encode_row, pad_rows
from engram_kernels.editing.values import ValueOptions

ROOT = Path(__file__).resolve().parent.parent
FILE = "counterfact_dev.json"
MEASURES = {
    "efficacy": ("prompt", "target_new", "ground_truth"),
    "paraphrase": ("rephrase_prompt", "target_new", "ground_truth"),
    "locality": ("locality_prompt", "locality_ground_truth", "target_new"),
}


def main() -> int:
    arguments = parse_arguments()
    console = Console()
    path = Path(arguments.data or os.environ.get("ENGRAM_DATA") or ROOT.parent / "shared" / "data") / FILE
    if not path.is_file():
        console.print(f"--data must be a folder that holds {FILE}, got {str(path.parent)!r}")
        return 2
    rows = json.loads(path.read_text(encoding="utf-8"))[arguments.start : arguments.start + arguments.rows]
    if not rows:
        console.print(f"--start must be below the number of rows, got {arguments.start}")
        return 2
    model, tokenizer = load_model(arguments.model, getattr(torch, arguments.dtype), arguments.device)
    options = {name: getattr(arguments, name) for name in ("steps", "learning_rate", "clamp", "stop_loss")}
    value = ValueOptions(**{name: option for name, option in options.items() if option is not None})
    editor = Editor(
        model, tokenizer, corpus=arguments.corpus, tokens=arguments.tokens, seed=arguments.seed,
        bare_share=arguments.bare_share, consistent_key=not arguments.original_key, value=value,
    )  # fmt: skip
    outcomes = []
    for number, row in enumerate(rows, arguments.start):
        outcomes.append(evaluate(editor, row, arguments.layer))
        marks = " ".join(f"{name} {'yes' if outcomes[-1]['after'][name] > 0 else 'no '}" for name in MEASURES)
        console.print(
            f"{number:5d}  {outcomes[-1]['seconds']:5.1f} s  {marks}  {row['prompt']} → {row['target_new']}",
            soft_wrap=True,
        )
    summary = summarise(outcomes)
    report(console, summary, outcomes)
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "data")}
        result = {"settings": settings, "torch": torch.__version__, "summary": summary, "rows": outcomes}
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20, help="how many rows")
    parser.add_argument("--start", type=int, default=0, help="the first row")
    parser.add_argument("--data", help=f"folder of {FILE} (default $ENGRAM_DATA, else ../shared/data)")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device")
    parser.add_argument("--layer", type=int, help="decoder layer (default: the editor's)")
    parser.add_argument("--corpus", help="text file for the covariance (default: the editor's)")
    parser.add_argument("--tokens", type=int, help="tokens for the covariance (default: the editor's)")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--clamp", type=float)
    parser.add_argument("--stop-loss", type=float)
    parser.add_argument("--original-key", action="store_true", help="ROME as first published, not R-ROME")
    parser.add_argument("--bare-share", type=float, default=0.5, help="share of the bare prompt's key")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write settings, summary and rows to this file")
    return parser.parse_args()


def evaluate(editor: Editor, row: dict, layer: int | None) -> dict:
    """Edit, measure, revert, and check that every weight is as it was."""
    edit = Edit(row["subject"], row["prompt"], row["target_new"])
    before = margins(editor.model, editor.tokenizer, row)
    weights = {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}
    started = time.perf_counter()
    result = editor.edit(edit, layer)
    seconds = time.perf_counter() - started
    after = margins(editor.model, editor.tokenizer, row)
    result.revert()
    state = editor.model.state_dict()
    exact = all(same_bits(state[name], tensor) for name, tensor in weights.items())
    record = result.records[0]
    return {
        "case_id": row["case_id"],
        "before": before,
        "after": after,
        "probability": record.probability_after,
        "steps": len(record.losses),
        "loss": record.losses[-1],
        "seconds": seconds,
        "reverted_exactly": exact,
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@torch.no_grad()
def margins(model, tokenizer, row: dict) -> dict[str, float]:
    """By how much the mean log-probability of the right answer exceeds the other's, for each measure."""
    pairs = [
        (row[prompt], row[answer]) for prompt, right, other in MEASURES.values() for answer in (right, other)
    ]
    encoded = [encode_row(tokenizer, prompt, "{}", answer) for prompt, answer in pairs]
    ids, mask = pad_rows([row.ids for row in encoded], model.get_input_embeddings().weight.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1).cpu()
    means = [
        logits[i].gather(-1, ids[i, 1:, None].cpu())[row.target - 1 : len(row.ids) - 1].mean().item()
        for i, row in enumerate(encoded)
    ]
    return {name: means[2 * i] - means[2 * i + 1] for i, name in enumerate(MEASURES)}


def summarise(outcomes: list[dict]) -> dict:
    def fraction(when: str, name: str) -> float:
        return sum(outcome[when][name] > 0 for outcome in outcomes) / len(outcomes)

    return {
        "rows": len(outcomes),
        "efficacy": fraction("after", "efficacy"),
        "paraphrase": fraction("after", "paraphrase"),
        "locality": fraction("after", "locality"),
        "unedited": {name: fraction("before", name) for name in MEASURES},
        "reverted_exactly": sum(outcome["reverted_exactly"] for outcome in outcomes),
        "median_seconds": sorted(outcome["seconds"] for outcome in outcomes)[len(outcomes) // 2],
    }


def report(console: Console, summary: dict, outcomes: list[dict]) -> None:
    table = Table(
        title=f"CounterFact, {summary['rows']} rows, {summary['median_seconds']:.1f} s an edit (median)"
    )
    for column in ("measure", "unedited", "edited"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for name in MEASURES:
        table.add_row(name, f"{summary['unedited'][name]:.3f}", f"{summary[name]:.3f}")
    table.add_row("reverted bit for bit", "", f"{summary['reverted_exactly']}/{summary['rows']}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
