"""Files of facts, in the formats in which data sets are published, as cases to edit and measure."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from pathlib import Path
from typing import NamedTuple

from .._io import encoding_of
from .cases import Case
from .fields import Fields
from .readers import reader

PROTOCOLS = ("memit", "easyedit")
GZIP = b"\x1f\x8b"


class Cases(NamedTuple):
    """The cases of a file, and why its other rows were left out."""

    cases: list[Case]
    refused: list[str]


def read_cases(
    path: str | os.PathLike,
    start: int = 0,
    rows: int | None = None,
    skip_bad: bool = False,
    zsre: str = "memit",
) -> Cases:
    """Read rows of a data set from a JSON array, or from JSON lines.

    The formats are told by their fields: CounterFact as the ROME repository and as EasyEdit have it, zsRE,
    KnowEdit (WikiData_recent, WikiData_counterfact, ZsRE, WikiBio), CKnowEdit, MQuAKE, RippleEdits,
    WikiBigEdit, UnKE and AKEW; `engram_kernels.evaluation.readers` has a function for each.

    Args:
        path: the file.
        start: the first row, counted from 0.
        rows: how many; None: all that follow.
        skip_bad: leave a bad row out, and say why; False: raise.
        zsre: whose protocol zsRE's file is read by. `"memit"`: edits write the first right answer, and
            locality prompts get a question mark (Meng et al. 2023, arXiv 2210.07229). `"easyedit"`: edits
            write the made-up answer (Mitchell et al. 2022, arXiv 2110.11309).

    Returns:
        `(cases, refused)`: the rows that can be edited, and of each other one a sentence.

    Raises:
        ValueError: the file cannot be read or holds no rows, `start` is beyond them, a row is of no known
            format, or lacks something: the message names the row and what it lacks, or the fields it has.

    Example:
        >>> cases, _ = read_cases("counterfact.json", start=100, rows=20)
    """
    if zsre not in PROTOCOLS:
        raise ValueError(f"zsre: expected one of {', '.join(PROTOCOLS)}, got {zsre!r}")
    found = read_rows(Path(path))
    if not 0 <= start < len(found):
        raise ValueError(f"start: expected from 0 to {len(found) - 1}, the last row, got {start}")
    if rows is not None and rows < 1:
        raise ValueError(f"rows: expected at least 1, got {rows}")
    result = Cases([], [])
    for number, row in enumerate(found[start : None if rows is None else start + rows], start):
        try:
            result.cases.append(case_of(row, number, zsre))
        except (ValueError, TypeError) as error:
            if not skip_bad:
                raise
            result.refused.append(str(error))
    if not result.cases:
        raise ValueError(f"data: expected rows that can be read, got none: {result.refused[0]}")
    return result


def case_of(row: object, number: int, zsre: str = "memit") -> Case:
    """One row as a case; see `read_cases`.

    Raises:
        ValueError: the row is of no known format, lacks something, or its prompt does not name the subject.
    """
    if not isinstance(row, dict):
        raise ValueError(f"data: expected an object in row {number}, got {type(row).__name__}")
    fields = Fields(row, number)
    found = reader(fields, zsre)
    name = next((str(row[key]) for key in ("case_id", "id") if row.get(key) is not None), str(number))
    try:
        return Case(name=name, kind=found.name, **found.read(fields))
    except (ValueError, TypeError) as error:
        if str(error).startswith("data: "):
            raise
        raise ValueError(f"data: row {number}: {error}") from error


def read_rows(path: Path) -> list:
    """The rows of a JSON array, or of one JSON object a line; the file may be compressed by gzip.

    The text is in the Unicode encoding that it names by its first bytes, or in UTF-8.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content.startswith(GZIP) else content
        text = content.decode(encoding_of(content))
    # What ends too early, or is compressed otherwise, is no OSError.
    except (OSError, ValueError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"data: expected a file of rows, got {str(path)!r} ({reason})") from None
    if text.lstrip().startswith("["):
        rows = _parsed(text, f"in {str(path)!r}")
    else:
        # Not splitlines(): a text may hold characters that it takes for line breaks.
        lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        rows = [_parsed(line, f"in line {i} of {str(path)!r}") for i, line in lines]
    if not rows:
        raise ValueError(f"data: expected rows in {str(path)!r}, got none")
    return rows


def _parsed(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data: expected JSON {where}, got {text[:60]!r} ({error})") from None
