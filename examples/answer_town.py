"""A town in forty facts, asked sixty questions, thirty of which nothing there answers.

    python examples/answer_town.py

The facts have commas, quotes, four scripts, two contradictions and a story of 2,000 characters. Printed are
the shares of answers that hold the right words, of questions whose fact came first, and of unanswerable
questions that were recognised: "I don't know", or an answer that is said to be the model's own. Beside the
memory stand plain retrieval, which tells the nearest fact and believes the model; the readout alone, as
token embeddings, in place of the ledger's text; and the bare model. Then facts are forgotten, each for
itself, and all other questions are asked again.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engram_kernels._io import write_json
from engram_kernels.hf.loading import load_model
from engram_kernels.larimar import Answer, Answerer, TokenValues, row_weights
from engram_kernels.larimar.answering import ALONE, TOLD
from engram_kernels.larimar.grounding import grounded
from engram_kernels.memory import EpisodicMemory, load_encoder

TOWN = Path(__file__).parent / "town"
# Tokens of a fact that is read from the memory alone.
SLOTS = 40


class Cached(Answerer):
    """An answerer that lets its model say the same thing only once."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.heard: dict[tuple[str, str], str] = {}

    def say(self, prompts: Sequence[tuple[str, str]]) -> list[str]:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.heard]
        self.heard.update(zip(new, super().say(new), strict=True))
        return [self.heard[prompt] for prompt in prompts]


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (TOWN / name).read_text(encoding="utf-8").splitlines()]


def filled(encoder) -> EpisodicMemory:
    """A memory of the town, as `engram memory write` makes it."""
    facts = read("facts.jsonl")
    latents, parts = encoder.encode_passages([fact["value"] for fact in facts])
    memory = EpisodicMemory(encoder.latent, encoder.latent, ridge="loo", encoder=encoder.name)
    names, texts = zip(*((fact["id"], fact["value"]) for fact in facts), strict=True)
    memory.write(latents, ids=names, texts=texts, parts=parts)
    return memory


def asked(answerer: Answerer, questions: Sequence[dict]) -> dict[str, Answer]:
    texts = [question["question"] for question in questions]
    return dict(zip(texts, answerer.answer(texts), strict=True))


def is_right(question: dict, text: str) -> bool:
    return any(words.lower() in text.lower() for words in question["answer"])


def shown(question: dict, answer: Answer) -> str:
    if "fact" in question:
        good = is_right(question, answer.text)
    else:
        good = answer.source in ("nothing", "model")
    return f"{'right' if good else 'WRONG'} {answer.source:7} {question['question']} → {answer.text}"


def aloud(answerer: Cached, questions: Sequence[dict]) -> list[str]:
    """Answers from the readout alone: the text nearest to it is told, and not the ledger's."""
    memory = answerer.memory
    values = TokenValues(answerer.decoder, answerer.tokenizer, SLOTS)
    texts = [entry.text for _, entry in memory.ledger.items() for _ in entry.key]
    weights = row_weights(memory, answerer.encoder.encode([q["question"] for q in questions]))
    told = values.decode(weights.float() @ values.encode(texts))
    asked = [question["question"] for question in questions]
    said = answerer.say([(TOLD, f"{text}\n\n{one}") for text, one in zip(told, asked, strict=True)])
    kept = [grounded(*one) for one in zip(said, told, asked, strict=True)]
    return [text if answer is None else answer for text, answer in zip(told, kept, strict=True)]


def main(
    forget: Annotated[int, typer.Option(help="How many facts to forget, each for itself.")] = 3,
    report: Annotated[Path | None, typer.Option(help="JSON file for answers and figures.")] = None,
) -> None:
    """Ask, print every answer and the table."""
    console = Console()
    encoder, (decoder, tokenizer) = load_encoder("minilm"), load_model("smollm2")
    answerer = Cached(filled(encoder), encoder, decoder, tokenizer)
    questions = read("questions.jsonl")
    told = [question for question in questions if "fact" in question]
    untold = [question for question in questions if "fact" not in question]
    answers = asked(answerer, questions)
    for question in questions:
        console.print(escape(shown(question, answers[question["question"]])), highlight=False, soft_wrap=True)

    def share(kind: Sequence[dict], good) -> str:
        return f"{sum(map(good, kind)) / len(kind):.3f}"

    texts = [question["question"] for question in told]
    nearest = [best for (best,) in answerer.memory.recall(encoder.encode(texts), 1)]
    plain = answerer.say(
        [(TOLD, f"{best.entry.text}\n\n{text}") for best, text in zip(nearest, texts, strict=True)]
    )
    firsts = dict(zip(texts, nearest, strict=True))
    plainly = dict(zip(texts, plain, strict=True))
    from_readout = dict(zip(texts, aloud(answerer, told), strict=True))
    bare = dict(zip(texts, answerer.say([(ALONE, text) for text in texts]), strict=True))
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", "fact first", "answers right", "of them quoted", "unanswerable recognised"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row(
        "memory",
        share(told, lambda q: answers[q["question"]].facts[0].recalled.name == q["fact"]),
        share(told, lambda q: is_right(q, answers[q["question"]].text)),
        share(
            told,
            lambda q: answers[q["question"]].source == "quote" and is_right(q, answers[q["question"]].text),
        ),
        share(untold, lambda q: answers[q["question"]].source in ("nothing", "model")),
    )
    table.add_row(
        "plain retrieval",
        share(told, lambda q: firsts[q["question"]].name == q["fact"]),
        share(told, lambda q: is_right(q, plainly[q["question"]])),
        "",
        "0.000",
    )
    table.add_row(
        "readout alone", "", share(told, lambda q: is_right(q, from_readout[q["question"]])), "", ""
    )
    table.add_row("bare model", "", share(told, lambda q: is_right(q, bare[q["question"]])), "", "")
    console.print(table)
    whole, changed = answerer.memory, {}
    for gone in [question["fact"] for question in told][:: max(1, len(told) // max(1, forget))][:forget]:
        answerer.memory = copy.deepcopy(whole)
        answerer.memory.forget(ids=[gone])
        others = [question for question in questions if question.get("fact") != gone]
        changed[gone] = [
            (question, answers[question].text, now.text)
            for question, now in asked(answerer, others).items()
            if now.text != answers[question].text
        ]
        console.print(f"{gone} forgotten: {len(changed[gone])} of {len(others)} other answers changed.")
        for question, now in asked(answerer, [q for q in told if q["fact"] == gone]).items():
            console.print(escape(f"  {question} → {now.text}"), soft_wrap=True)
        for line in changed[gone]:
            console.print(escape("  " + " | ".join(line)), soft_wrap=True)
    if report is not None:
        said = {
            question: {"source": answer.source, "text": answer.text} for question, answer in answers.items()
        }
        write_json(report, {"answers": said, "from the readout": from_readout, "changed": changed})


if __name__ == "__main__":
    typer.run(main)
