"""Where the text for a layer's statistics comes from."""

from __future__ import annotations

import bz2
import html
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ..errors import EngramError
from ..models.loading import package_file
from .tokens import context_length

WIKIPEDIA_IN_GENSIM = "test/test_data/enwiki-latest-pages-articles1.xml-*-shortened.bz2"


def wikipedia_file() -> Path | None:
    """The Wikipedia articles that the package `gensim` carries, or None where it is not installed."""
    return package_file("gensim", WIKIPEDIA_IN_GENSIM)


def read_texts(corpus: str | os.PathLike | Iterable[str]) -> Iterator[str]:
    """The texts of a corpus, which is a file or an iterable of strings.

    A file is plain text, split at blank lines, or a compressed Wikipedia dump (`*.bz2`).

    Raises:
        EngramError: the file cannot be read.
        TypeError: `corpus`, or one of its items, is neither.
    """
    if isinstance(corpus, (str, os.PathLike)):
        path = Path(corpus)
        try:
            yield from wikipedia_articles(path) if path.suffix == ".bz2" else _paragraphs(path)
        # EOFError: a dump that is cut off; ValueError: text that is not UTF-8, or a NUL in the path.
        except (OSError, EOFError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise EngramError(
                f"corpus: expected a text file that can be read, got {str(path)!r} ({reason})"
            ) from error
        return
    if not isinstance(corpus, Iterable):
        raise TypeError(f"corpus: expected a path or an iterable of strings, got {type(corpus).__name__}")
    for text in corpus:
        if not isinstance(text, str):
            raise TypeError(f"corpus: expected strings, got {type(text).__name__}")
        yield text


def token_ids(tokenizer, texts: Iterable[str], limit: int) -> torch.Tensor:
    """The first `limit` tokens of the texts `[count]`, each text closed by the end-of-text token.

    Raises:
        EngramError: the texts hold no token.
    """
    ids: list[int] = []
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        if text.strip():
            # verbose=False: a text longer than the model's context is no mistake here, it is cut into chunks.
            ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + separator
        if len(ids) >= limit:
            break
    if len(ids) <= len(separator):
        raise EngramError("corpus: expected some text, got none")
    return torch.tensor(ids[:limit])


@torch.no_grad()
def sample_ids(model, tokenizer, limit: int, seed: int, rows: int = 64, length: int = 128) -> torch.Tensor:
    """`limit` tokens sampled from the model itself `[count]`; the global random state stays as it is."""
    device = model.get_input_embeddings().weight.device
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id or 0
    length = min(length, context_length(model) or length)
    generator = torch.Generator().manual_seed(seed)
    sampled: list[torch.Tensor] = []
    while sum(block.numel() for block in sampled) < limit:
        block = torch.full((rows, 1), start)
        cache = None
        for _ in range(length):
            output = model(input_ids=block[:, -1:].to(device), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            chances = output.logits[:, -1].float().softmax(-1).cpu()
            block = torch.cat([block, torch.multinomial(chances, 1, generator=generator)], dim=1)
        sampled.append(block[:, 1:].flatten())
    return torch.cat(sampled)[:limit]


def wikipedia_articles(path: Path) -> Iterator[str]:
    """The articles of a compressed MediaWiki dump as plain text; redirects and stubs are left out."""
    with bz2.open(path, "rt", encoding="utf-8") as dump:
        # A dump may be many gigabytes: hold one page at a time.
        page: list[str] = []
        for line in dump:
            page.append(line)
            if "</page>" in line:
                match = re.search(r"<text[^>]*>(.*?)</text>", "".join(page), re.DOTALL)
                page.clear()
                if match and not match[1].lstrip().lower().startswith("#redirect"):
                    article = plain_text(html.unescape(match[1]))
                    if len(article) > 500:
                        yield article


def plain_text(markup: str) -> str:
    """The running text of wiki markup, without templates, tables, references, files, lists and headings."""
    text = re.sub(r"<!--.*?-->", "", markup, flags=re.DOTALL)
    text = re.sub(r"<ref[^>]*/>", "", text)
    text = re.sub(
        r"<(ref|math|gallery|timeline|table|div|blockquote|code)\b.*?</\1>", "", text, flags=re.DOTALL
    )
    text = _until_stable(r"\{\{[^{}]*\}\}", "", text)
    text = _until_stable(r"\{\|(?:(?!\{\|).)*?\|\}", "", text)
    text = _until_stable(
        r"\[\[(?:File|Image|Category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", "", text
    )
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[\w+://\S*\s*([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}", "", text)
    text = html.unescape(re.sub(r"<[^<>]*>", "", text))
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and line[0] not in "=*#:;|!{}")


def _until_stable(pattern: str, replacement: str, text: str) -> str:
    """Replace nested constructs from the inside out."""
    count = 1
    while count:
        text, count = re.subn(pattern, replacement, text, flags=re.DOTALL)
    return text


def _paragraphs(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        paragraph: list[str] = []
        for line in file:
            if line.strip():
                paragraph.append(line)
            elif paragraph:
                yield "".join(paragraph)
                paragraph = []
        if paragraph:
            yield "".join(paragraph)
