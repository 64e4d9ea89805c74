"""`engram edit`: one fact, before and after."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape

from ..hf.tokens import Row, check_length, encode_row, open_ids, prompt_words
from .common import (
    Corpus,
    Device,
    Dtype,
    Layers,
    Method,
    Model,
    NotAsWantedError,
    Seed,
    Tokens,
    Values,
    bars,
    check_file,
    check_folder,
    group_of_ranks,
    layers_of,
    load,
    reading,
    write_json,
)
from .output import MARKS, emit, note, show, table

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
    also: Annotated[
        list[str] | None,
        typer.Option(help="The fact in other words, with {}, to be taught too; may be repeated."),
    ] = None,
    paraphrase: Annotated[
        list[str] | None,
        typer.Option(help="The fact in other words, with {}, to be asked only; may be repeated."),
    ] = None,
    control: Annotated[
        list[str] | None, typer.Option(help="A prompt whose answer shall stay; may be repeated.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompts are what a user says in a chat; the model answers.")
    ] = False,
    space: Annotated[
        bool | None,
        typer.Option(
            "--space/--no-space", help="Whether a space stands before the target; default: by script."
        ),
    ] = None,
    suffixes: Annotated[
        bool,
        typer.Option(
            "--suffixes", help="The target's last word may go on, as with case endings: Rooma, Roomassa."
        ),
    ] = False,
    method: Method = "engram",
    layers: Layers = None,
    values: Values = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Of the value's optimisation; larger ones change less.")
    ] = None,
    corpus: Corpus = None,
    tokens: Tokens = None,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
    save: Annotated[Path | None, typer.Option(help="Folder to save the edit to.")] = None,
    report: Annotated[Path | None, typer.Option(help="JSON file to write the answers to.")] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Exit with status 3 unless the edit took and every answer is as wanted."
        ),
    ] = False,
) -> None:
    """Rewrite a fact in a model, and show answers before and after.

    Example: engram edit --subject "The Eiffel Tower" --prompt "{} is located in the city of" --target Rome
    """
    from ..editing import Edit, Editor
    from ..editing.methods import method_of
    from ..editing.reach import reached

    value = method_of(method).value
    asked_layers = layers_of(layers)
    with reading("also", "paraphrases"):
        fact = Edit(subject, prompt, target, also or (), space, chat, suffixes=suffixes)
    asked = [("edited", one) for one in fact.prompts]
    for text in paraphrase or ([] if also or chat else [frame.format(prompt) for frame in FRAMES]):
        with reading("paraphrase", "prompt"):
            asked.append(("paraphrase", Edit(subject, text, target, space=space, chat=chat).prompt))
    controls = control or [text for text in CONTROLS if fact.subject not in text]
    if weight_decay is not None:
        value = replace(value, weight_decay=weight_decay)
    check_file("report", report)
    if save is not None:
        check_folder("save", save)

    with bars() as progress:
        network, tokenizer = load(progress, model, dtype, device)
        texts = [encode_row(tokenizer, fact.subject, one).ids for _, one in asked]
        texts += [open_ids(tokenizer, text) for text in controls]
        wanted = [
            encode_row(tokenizer, fact.subject, one, target, space=space, whole=not suffixes)
            for _, one in asked
        ]
        rows = [*wanted, *(Row(ids, 0, len(ids)) for ids in texts[len(wanted) :])]
        for row, text in zip(rows, [*(prompt_words(one) for _, one in asked), *controls], strict=True):
            check_length(network, row, text)
        editor = Editor(
            network, tokenizer, corpus=corpus, tokens=tokens, value=value, seed=seed, progress=progress,
            group=group_of_ranks(),
        )  # fmt: skip
        before = [_answers(network, tokenizer, ids) for ids in texts]
        result = editor.edit(fact, asked_layers, method, values=values)
        after = [_answers(network, tokenizer, ids) for ids in texts]
        said = [one.said for one in reached(network, wanted, [fact.text] * len(wanted))]

    record = result.records[0]
    change = f"{record.probability_before:.4f} → {record.probability_after:.4f}"
    took = "" if record.took else "; the edit did not take"
    answers = table(
        "prompt", "before", "after", "", title=fact.text,
        caption=f"{model}, {', '.join(result.modules)}: p({fact.target}) on the edited prompt {change}{took}",
    )  # fmt: skip
    for column in answers.columns[1:]:
        column.no_wrap = True
    rows = []
    kinds = [*(kind for kind, _ in asked), *("control" for _ in controls)]
    named = [*(prompt_words(one).replace("{}", fact.subject) for _, one in asked), *controls]
    # The whole target, as greedy decoding gives it; of a control the first token, which stays.
    stays = [old[0][0] == new[0][0] for old, new in zip(before, after, strict=True)]
    good = [*said, *stays[len(said) :]]
    for kind, text, old, new, wanted_so in zip(kinds, named, before, after, good, strict=True):
        answers.add_row(f"[dim]{kind}[/dim]\n{escape(text)}", _lines(old), _lines(new), MARKS[wanted_so])
        rows.append({"kind": kind, "prompt": text, "before": old, "after": new, "as_wanted": wanted_so})
    show(answers)
    said_of_it = {
        "model": model,
        "method": method,
        "modules": result.modules,
        "text": fact.text,
        "took": record.took,
        "probability": {"before": record.probability_before, "after": record.probability_after},
        "reached": record.reached,
        "answers": rows,
    }
    emit(said_of_it)
    if save is not None:
        result.save_pretrained(save)
        note(f"Saved to {save}.")
    if report is not None:
        write_json(report, said_of_it)
    if strict and not (record.took and all(good)):
        raise NotAsWantedError(
            "strict: expected an edit that took and every answer as wanted, got those marked with ✗"
        )


def _answers(model, tokenizer, ids: list[int], count: int = 3) -> list[tuple[str, float]]:
    """The likeliest next tokens with their probabilities."""
    read = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        likely = model(input_ids=read).logits[0, -1].float().softmax(-1).topk(count)
    return [
        (tokenizer.decode([token]).strip(), probability)
        for token, probability in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
    ]


def _lines(answers: list[tuple[str, float]]) -> str:
    return "\n".join(f"{probability:5.1%} {escape(answer)}" for answer, probability in answers)
