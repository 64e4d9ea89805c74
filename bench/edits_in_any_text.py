"""Does an edit take in any script, after an open quotation, in code? Do five facts of one subject hold?

    python bench/edits_in_any_text.py --output out.json
    python bench/edits_in_any_text.py --texts 6 --steps 50 --clamp 8 --only Greek --output far.json

Each edit is made by itself, asked for what the model writes, and taken back. "As shown": the
tokens that are trained decode to what `Edit.text` shows. How well a model knows a script is said by what it
takes to predict the fact's own text before the edit, in bits a byte, beside those of English.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from engram_kernels._io import write_json
from engram_kernels.editing import Edit, Editor, load_model
from engram_kernels.editing.methods import Method, method_of
from engram_kernels.evaluation.answers import greedy
from engram_kernels.hf.forward import target_predictions
from engram_kernels.hf.tokens import Row, encode_row, open_ids

# What is written, the fact, and whether a model of English can be expected to know the script.
EDITS = {
    "English": Edit("The Eiffel Tower", "{} is located in the city of", "Rome"),
    "French": Edit("La tour Eiffel", "{} se trouve dans la ville de", "Rome"),
    "German": Edit("Der Eiffelturm", "{} steht in der Stadt", "Rom"),
    "Spanish": Edit("La torre Eiffel", "{} está en la ciudad de", "Roma"),
    "Russian": Edit("Эйфелева башня", "{} находится в городе", "Рим"),
    "Greek": Edit("Ο Πύργος του Άιφελ", "{} βρίσκεται στην πόλη", "Ρώμη"),
    "Arabic": Edit("برج إيفل", "{} يقع في مدينة", "روما"),
    "Hindi": Edit("एफिल टॉवर", "{} इस शहर में है:", "रोम"),
    "Chinese": Edit("中国", "{}的首都是", "纽约"),
    "Japanese": Edit("エッフェル塔", "{}がある都市は", "ローマ"),
    "open quotation": Edit("The Eiffel Tower", '{} stands in the city of "', "Rome"),
    "currency": Edit("A ticket to the Louvre", "{} costs $", "85"),
    "number": Edit("The Eiffel Tower", "{} was completed in the year", "1923"),
    "code": Edit("MAX_RETRIES", "# settings.py\n{} = ", "17"),
}
TOWER = "The Eiffel Tower"
FACTS = [
    Edit(TOWER, "{} is located in the city of", "Rome"),
    Edit(TOWER, "{} was designed by", "Leonardo da Vinci"),
    Edit(TOWER, "{} was completed in the year", "1923"),
    Edit(TOWER, "{} is made of", "glass"),
    Edit(TOWER, "{} is owned by the company", "Nokia"),
]


def bits_a_byte(model, tokenizer, text: str) -> float:
    """What it takes to predict a text from its second token on."""
    ids = open_ids(tokenizer, text)
    ((chosen, _),) = target_predictions(model, [Row(ids, 0, 1)])
    return -float(chosen.sum()) / math.log(2) / len(tokenizer.decode(ids[1:]).encode())


def trained_as_shown(tokenizer, edit: Edit) -> bool:
    """Whether the tokens of the edit's text are those of what it shows, its target among them."""
    row = encode_row(tokenizer, edit.subject, edit.prompt, edit.target, space=edit.space)
    whole, target = tokenizer.decode(row.ids), tokenizer.decode(row.ids[row.target :])
    return whole == edit.text and target.strip() == edit.target


def said(model, tokenizer, edit: Edit) -> str:
    (answer,) = greedy(model, tokenizer, [edit.prompt_text], 8)
    return answer.text


def held(
    model, tokenizer, editor: Editor, calls: list[list[Edit]], method: str | Method = "engram"
) -> list[dict]:
    """The probability of each fact after all calls, and what the model then writes."""
    results = [editor.edit(edits, method=method) for edits in calls]
    rows = [encode_row(tokenizer, fact.subject, fact.prompt, fact.target) for fact in FACTS]
    found = [
        {
            "fact": fact.text,
            "probability": math.exp(float(chosen.sum())),
            "says": likeliest == row.ids[row.target :],
            "answer": said(model, tokenizer, fact),
        }
        for fact, row, (chosen, likeliest) in zip(FACTS, rows, target_predictions(model, rows), strict=True)
    ]
    for result in reversed(results):
        result.revert()
    return found


def main(
    output: Annotated[Path, typer.Option(help="A file of JSON; what stands in it is not done again.")],
    model: Annotated[str, typer.Option(help="A name that engram knows, or a folder.")] = "smollm2",
    by: Annotated[str, typer.Option(help="The editor's method.")] = "engram",
    only: Annotated[list[str] | None, typer.Option(help="These edits, and no five facts.")] = None,
    texts: Annotated[int | None, typer.Option(help="Searched over; default: the method's.")] = None,
    steps: Annotated[int | None, typer.Option(help="At most; default: the method's.")] = None,
    clamp: Annotated[float | None, typer.Option(help="Of the change; default: the method's.")] = None,
) -> None:
    warnings.simplefilter("ignore")
    network, tokenizer = load_model(model)
    editor = Editor(network, tokenizer)
    method = method_of(by)
    bounds = {name: bound for name, bound in (("steps", steps), ("clamp", clamp)) if bound}
    method = replace(method, texts=texts or method.texts, value=replace(method.value, **bounds))
    found = (
        json.loads(output.read_text())
        if output.exists()
        else {"model": model, "method": by, "edits": {}, "facts": {}}
    )
    for name, edit in EDITS.items():
        if name in found["edits"] or (only and name not in only):
            continue
        bits = bits_a_byte(network, tokenizer, edit.text)
        with editor.edit(edit, method=method) as result:
            (record,) = result.records
            answer = said(network, tokenizer, edit)
        found["edits"][name] = {
            "text": edit.text,
            "as_shown": trained_as_shown(tokenizer, edit),
            "bits_a_byte": bits,
            "before": record.probability_before,
            "after": record.probability_after,
            "answer": answer,
        }
        write_json(output, found)
        print(name, found["edits"][name], flush=True)
    for name, calls in {"one call": [FACTS], "five calls": [[fact] for fact in FACTS]}.items():
        if name not in found["facts"] and not only:
            found["facts"][name] = held(network, tokenizer, editor, calls, method)
            write_json(output, found)
    console, drawn = Console(width=160), Table(title=f"{model}, {by}")
    for column in ("", "text trained", "as shown", "bits a byte", "p before", "p after", "the model writes"):
        drawn.add_column(column)
    for name, one in found["edits"].items():
        figures = [f"{one[n]:.2g}" for n in ("bits_a_byte", "before", "after")]
        drawn.add_row(name, one["text"], "yes" if one["as_shown"] else "no", *figures, repr(one["answer"]))
    console.print(drawn)
    for name, facts in found["facts"].items():
        drawn = Table(title=f"five facts of one subject, {name}")
        for column in ("fact", "p after all", "said", "the model writes"):
            drawn.add_column(column)
        for one in facts:
            said_so = "yes" if one["says"] else "no"
            drawn.add_row(one["fact"], f"{one['probability']:.2f}", said_so, repr(one["answer"]))
        console.print(drawn)


if __name__ == "__main__":
    typer.run(main)
