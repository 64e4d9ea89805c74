"""Do edits take? What an edited model writes when it is asked in other words, in a question, in a chat.

    python bench/take_edits.py --method plain --output out        makes the edits, one method a run
    python bench/edits_that_take.py --output out                  measures what is there, and prints the table

Each row's edits are added to the model by themselves, asked, and taken away again. A run that was cut off
goes on by the same command: `out/METHOD/ROW.json` holds a row's answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from take_rows import TakeRow, read_take_rows

from engram_kernels._io import write_json
from engram_kernels.editing import load_model
from engram_kernels.editing.held_out import text_loss, wikipedia_rows
from engram_kernels.evaluation.answers import greedy, success
from engram_kernels.hf.tokens import chat_text

UNEDITED = "unedited"
# What the unedited model answers where it knows the truth: how well its own facts hold in other words.
OWN = "own facts"
# The last asks the subject for something else, which the target should not answer.
FORMS = ("prompt", "unseen", "question", "chat", "elsewhere")
# Questions and chats may begin with other words than the answer.
TOKENS = {"prompt": 8, "unseen": 8, "question": 12, "chat": 12, "elsewhere": 8}


def questions(tokenizer, row: TakeRow) -> dict[str, list[str]]:
    """What is asked of a row, by form."""

    def chat(text: str) -> str:
        return chat_text(tokenizer, [("user", row.about(text))])[0]

    return {
        "prompt": [row.about(row.prompt)],
        "unseen": [row.about(text) for text in row.unseen],
        "question": [row.about(row.question)],
        "chat": [chat(row.chat)] if tokenizer.chat_template else [],
        "elsewhere": [row.about(text) for text in row.elsewhere],
    }


def ask(model, tokenizer, row: TakeRow, text: Sequence[int]) -> dict:
    """Everything that is measured of a row in one state of the model."""
    asked = questions(tokenizer, row)
    flat = [(form, prompt) for form in FORMS for prompt in asked[form]]
    written = greedy(model, tokenizer, [prompt for _, prompt in flat], [TOKENS[form] for form, _ in flat])
    return {
        "answers": [
            {"form": form, "prompt": prompt, "text": answer.text}
            for (form, prompt), answer in zip(flat, written, strict=True)
        ],
        "neighbours": [answer.first for answer in greedy(model, tokenizer, row.neighbours, 1)],
        "text_loss": text_loss(model, [text]),
    }


@contextmanager
def edited(model, file: Path) -> Iterator[dict[str, float]]:
    """The edit of a file in the model; yields the seconds it took and how large it is."""
    with safe_open(file, framework="pt") as kept:
        seconds = {name: float(value) for name, value in kept.metadata().items()}
        tensors = {name: kept.get_tensor(name) for name in kept.keys()}
    names = {name.rsplit(".", 1)[0] for name in tensors}
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    changes = {name: tensors[f"{name}.left"] @ tensors[f"{name}.right"] for name in names}
    try:
        with torch.no_grad():
            for name, change in changes.items():
                model.get_parameter(name).add_(change)
        yield seconds | {"size": max(float(changes[n].norm() / before[n].norm()) for n in names)}
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                model.get_parameter(name).copy_(tensor)


def measure(model, tokenizer, folder: Path, rows: Sequence[TakeRow]) -> None:
    """Ask every row of every method's folder that has an edit and no answers yet."""
    # Every row has a text of its own: all rows together are a text of some thousand tokens.
    texts = dict(zip(rows, wikipedia_rows(tokenizer, rows=len(rows)), strict=True))
    methods = [UNEDITED, *sorted(path.name for path in folder.iterdir() if path.is_dir())]
    for method in dict.fromkeys(methods):
        for row in rows:
            out, edit = (folder / method / f"{row.number}.{kind}" for kind in ("json", "safetensors"))
            if out.exists() or (method != UNEDITED and not edit.exists()):
                continue
            if method == UNEDITED:
                out.parent.mkdir(exist_ok=True)
                write_json(out, ask(model, tokenizer, row, texts[row]))
                continue
            with edited(model, edit) as facts:
                write_json(out, facts | ask(model, tokenizer, row, texts[row]))
            print(method, row.number, row.subject, flush=True)


def summary(folder: Path, rows: Sequence[TakeRow]) -> dict[str, dict]:
    """The shares of each method, over the rows that it has."""
    found = {}
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        entries = []
        for row in rows:
            file, plain = path / f"{row.number}.json", folder / UNEDITED / f"{row.number}.json"
            if file.exists() and plain.exists():
                entries.append((row, *(json.loads(each.read_text()) for each in (file, plain))))
        if not entries:
            continue
        shares: dict = {"rows": len(entries)}
        shares |= _answered([(entry, row.target) for row, entry, _ in entries])
        kept = [
            fmean(a == b for a, b in zip(entry["neighbours"], plain["neighbours"], strict=True))
            for _, entry, plain in entries
        ]
        shares["neighbours_kept"] = fmean(kept)
        changes = [entry["text_loss"] - plain["text_loss"] for _, entry, plain in entries]
        shares["text_loss"] = fmean(changes)
        for name in ("seconds", "processor", "size"):
            if known := [entry[name] for _, entry, _ in entries if name in entry]:
                shares[name] = median(known)
        found[path.name] = shares
        if path.name == UNEDITED:
            true = [(entry, row.truth) for row, entry, _ in entries]
            known = [pair for pair in true if _answered([pair])["prompt"]["begins"]]
            if known:
                found[OWN] = {
                    "rows": len(known),
                    **_answered(known),
                    "neighbours_kept": 1.0,
                    "text_loss": 0.0,
                }
    return found


def _answered(entries: Sequence[tuple[dict, str]]) -> dict[str, dict[str, float]]:
    """By form, the shares of the answers that begin with, contain or are what was wanted."""
    shares = {}
    for form in FORMS:
        successes = [
            success(answer["text"], wanted)
            for entry, wanted in entries
            for answer in entry["answers"]
            if answer["form"] == form
        ]
        if successes:
            shares[form] = {
                name: fmean(getattr(one, name) for one in successes)
                for name in ("begins", "contains", "exact")
            }
    return shares


def table(found: dict[str, dict], title: str) -> Table:
    drawn = Table(title=title, caption="each form: answers that begin with / contain the target")
    for name in ("method", "rows", *FORMS, "neighbours kept", "text loss", "seconds", "‖ΔW‖/‖W‖"):
        drawn.add_column(name, justify="left" if name == "method" else "right")
    for method, shares in found.items():
        forms = [
            f"{shares[form]['begins']:.2f} / {shares[form]['contains']:.2f}" if form in shares else "–"
            for form in FORMS
        ]
        drawn.add_row(
            method,
            str(shares["rows"]),
            *forms,
            f"{shares['neighbours_kept']:.3f}",
            f"{shares['text_loss']:+.4f}",
            *(f"{shares[n]:.2f}" if n in shares else "–" for n in ("processor", "size")),
        )
    return drawn


def main(
    output: Annotated[Path, typer.Option(help="The folder of the edits; answers go there too.")],
    model: Annotated[str, typer.Option(help="A name that engram knows, or a folder.")] = "smollm2",
    rows: Annotated[int | None, typer.Option(help="The first so many; default: all.")] = None,
    summarise: Annotated[bool, typer.Option("--summarise", help="Only print what is there.")] = False,
    common: Annotated[bool, typer.Option("--common", help="Only rows that every method has.")] = False,
) -> None:
    wanted = read_take_rows()[:rows]
    if not summarise:
        network, tokenizer = load_model(model)
        measure(network, tokenizer, output, wanted)
    if common:
        folders = [path for path in output.iterdir() if path.is_dir() and any(path.glob("*.json"))]
        wanted = [row for row in wanted if all((path / f"{row.number}.json").exists() for path in folders)]
    found = summary(output, wanted)
    write_json(output / "summary.json", {"model": model, "methods": found})
    Console(width=180).print(table(found, f"{model}, {len(wanted)} rows, seconds of one processor core"))


if __name__ == "__main__":
    typer.run(main)
