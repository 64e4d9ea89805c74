"""Where the text for a layer's statistics comes from."""

from __future__ import annotations

import bz2
import html
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from ...errors import EngramError
from ...hf.generation import sample
from ...hf.loading import package_file
from ...hf.tokens import context_length

WIKIPEDIA_IN_GENSIM = "test/test_data/enwiki-latest-pages-articles1.xml-*-shortened.bz2"

# Characters after which a paragraph is cut, so that a file without blank lines does not fill the memory.
PARAGRAPH = 1 << 20

# Texts that are sampled from the model at a time, and the tokens of each.
SAMPLED_ROWS, SAMPLED_LENGTH = 64, 128


def wikipedia_file() -> Path | None:
    """The Wikipedia articles that the package `gensim` carries, or None where it is not installed."""
    return package_file("gensim", WIKIPEDIA_IN_GENSIM)


def read_texts(corpus: str | os.PathLike | Iterable[str | Mapping]) -> Iterator[str]:
    """The texts of a corpus, which is a file or an iterable of strings, one after the other.

    A file is plain text, split at blank lines, or a compressed Wikipedia dump (`*.bz2`). An iterable may be
    endless; where it gives mappings, as the library `datasets` does, their column `text` is taken.

    Raises:
        EngramError: the file cannot be read.
        TypeError: `corpus`, or one of its items, is neither.
        ValueError: a mapping has no column `text`.
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
    if isinstance(corpus, Mapping):
        raise TypeError(f"corpus: expected one data set, got a mapping of {_listed(corpus)}")
    if not isinstance(corpus, Iterable):
        raise TypeError(f"corpus: expected a path or an iterable of strings, got {type(corpus).__name__}")
    for text in corpus:
        if isinstance(text, Mapping):
            if "text" not in text:
                raise ValueError(f"corpus: expected a column 'text', got the columns {_listed(text)}")
            text = text["text"]
        if not isinstance(text, str):
            raise TypeError(f"corpus: expected strings, got {type(text).__name__}")
        yield text


class TokenStream:
    """The tokens of a corpus, an end-of-text token after each text. Read once, and only as far as asked.

    Args:
        tokenizer: of the model.
        corpus: as for `read_texts`.
    """

    def __init__(self, tokenizer, corpus: str | os.PathLike | Iterable[str | Mapping]):
        self._tokenizer = tokenizer
        self._corpus = corpus
        self._restart()

    def first(self, count: int) -> torch.Tensor:
        """The first `count` tokens `[count]`, or all where the corpus has fewer.

        Raises:
            EngramError: the texts hold no token, or cannot be read.
            TypeError, ValueError: the corpus is of another kind.
        """
        end = self._tokenizer.eos_token_id
        separator = [] if end is None else [end]
        try:
            while len(self._ids) < count and (text := next(self._texts, None)) is not None:
                if text.strip():
                    # verbose=False: a text longer than the model's context is no mistake here, it is cut.
                    ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                    self._ids.extend(ids + separator)
        except BaseException:
            # A reader that failed is spent: its beginning must not pass for the whole the next time.
            self._restart()
            raise
        if len(self._ids) <= len(separator):
            raise EngramError("corpus: expected some text, got none")
        return torch.frombuffer(self._ids[:count], dtype=torch.int64)

    def _restart(self) -> None:
        self._texts = read_texts(self._corpus)
        self._ids = array("q")


def sample_ids(model, tokenizer, limit: int, seed: int) -> torch.Tensor:
    """`limit` tokens sampled from the model itself `[count]`; the global random state stays as it is."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id or 0
    length = min(SAMPLED_LENGTH, context_length(model) or SAMPLED_LENGTH)
    generator = torch.Generator().manual_seed(seed)

    def choose(_numbers: list[int], logits: torch.Tensor) -> list[int]:
        chances = logits.softmax(-1).cpu()
        return torch.multinomial(chances, 1, generator=generator).flatten().tolist()

    sampled: list[int] = []
    while len(sampled) < limit:
        rows = sample(model, [[start]] * SAMPLED_ROWS, [length] * SAMPLED_ROWS, choose)
        sampled += [token for row in rows for token in row[1:]]
    return torch.tensor(sampled[:limit], device="cpu")


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
        size = 0
        for line in iter(lambda: file.readline(PARAGRAPH), ""):
            if line.strip():
                paragraph.append(line)
                size += len(line)
            if paragraph and (not line.strip() or size >= PARAGRAPH):
                yield "".join(paragraph)
                paragraph, size = [], 0
        if paragraph:
            yield "".join(paragraph)


def _listed(names: Iterable) -> str:
    return ", ".join(map(repr, names)) or "nothing"
