"""`engram edit`: one fact, before and after."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape
from rich.table import Table

from ..errors import EngramError
from ..hf.tokens import open_ids
from .common import (
    Corpus,
    Device,
    Dtype,
    Model,
    Seed,
    Tokens,
    bars,
    check_file,
    check_folder,
    console,
    load,
    reading,
    write_json,
)

# Framed like a paraphrase, for a prompt that comes without any.
FRAMES = ("It is well known that {}", "As every visitor learns, {}")
CONTROLS = (
    "The Louvre is located in the city of",
    "The Arc de Triomphe is located in the city of",
    "The Colosseum is located in the city of",
)


def edit(
    subject: Annotated[str, typer.Option(help="What the fact is about, as it stands in the text.")],
    prompt: Annotated[str, typer.Option(help="The text before the answer, with {} for the subject.")],
    target: Annotated[str, typer.Option(help="What the model shall say instead.")],
    model: Model = "smollm2",
    paraphrase: Annotated[
        list[str] | None, typer.Option(help="The same question in other words, with {}; may be repeated.")
    ] = None,
    control: Annotated[
        list[str] | None, typer.Option(help="A prompt whose answer shall stay; may be repeated.")
    ] = None,
    method: Annotated[str, typer.Option(help="engram, rome, memit, encore, …: docs/methods.md.")] = "engram",
    layer: Annotated[int | None, typer.Option(help="The decoder layer to write; default: by depth.")] = None,
    corpus: Corpus = None,
    tokens: Tokens = None,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
    save: Annotated[Path | None, typer.Option(help="Folder to save the edit to.")] = None,
    report: Annotated[Path | None, typer.Option(help="JSON file to write the answers to.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with status 1 unless every answer is as wanted.")
    ] = False,
) -> None:
    """Rewrite a fact in a model, and show answers before and after.

    Example: engram edit --subject "The Eiffel Tower" --prompt "{} is located in the city of" --target Rome
    """
    from ..editing import Edit, Editor
    from ..editing.methods import method_of

    method_of(method)
    fact = Edit(subject, prompt, target)
    prompts = [("edited", fact.text)]
    for text in paraphrase or [frame.format(prompt) for frame in FRAMES]:
        with reading("paraphrase", "prompt"):
            prompts.append(("paraphrase", Edit(subject, text, target).text))
    defaults = [text for text in CONTROLS if fact.subject not in text]
    prompts += [("control", text) for text in control or defaults]
    check_file("report", report)
    if save is not None:
        check_folder("save", save)

    with bars() as progress:
        network, tokenizer = load(progress, model, dtype, device)
        editor = Editor(network, tokenizer, corpus=corpus, tokens=tokens, seed=seed, progress=progress)
        before = [_answers(network, tokenizer, text) for _, text in prompts]
        result = editor.edit(fact, layer, method)
        after = [_answers(network, tokenizer, text) for _, text in prompts]

    record = result.records[0]
    change = f"{record.probability_before:.4f} → {record.probability_after:.4f}"
    table = Table("prompt", "before", "after", "", title=escape(f"{fact.text} → {fact.target}"))
    table.caption = escape(f"{model}, {result.modules[0]}: p({fact.target}) on the edited prompt {change}")
    rows = []
    for (kind, text), old, new in zip(prompts, before, after, strict=True):
        first = new[0][0]
        # The target may take several tokens: its first will do, but not the nothing that a line break leaves.
        good = first == old[0][0] if kind == "control" else first != "" and fact.target.startswith(first)
        mark = "[green]✓[/green]" if good else "[red]✗[/red]"
        table.add_row(f"[dim]{kind}[/dim]\n{escape(text)}", _lines(old), _lines(new), mark)
        rows.append({"kind": kind, "prompt": text, "before": old, "after": new, "as_wanted": good})
    console.print(table)
    if save is not None:
        result.save_pretrained(save)
        console.print(f"Saved to {escape(str(save))}.")
    if report is not None:
        probability = {"before": record.probability_before, "after": record.probability_after}
        write_json(report, {"module": result.modules[0], "probability": probability, "answers": rows})
    if strict and not all(row["as_wanted"] for row in rows):
        raise EngramError("strict: expected every answer as wanted, got those marked with ✗")


def _answers(model, tokenizer, text: str, count: int = 3) -> list[tuple[str, float]]:
    """The likeliest next tokens with their probabilities."""
    ids = torch.tensor([open_ids(tokenizer, text)], device=model.device)
    with torch.no_grad():
        likely = model(input_ids=ids).logits[0, -1].float().softmax(-1).topk(count)
    return [
        (tokenizer.decode([token]).strip(), probability)
        for token, probability in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
    ]


def _lines(answers: list[tuple[str, float]]) -> str:
    return "\n".join(f"{probability:5.1%} {escape(answer)}" for answer, probability in answers)
