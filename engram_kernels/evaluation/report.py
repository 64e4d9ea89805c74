"""The report of an evaluation: written after every case, and continued by the next run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from .._io import read_json, write_json
from .outcomes import Outcome, Retained

FORMAT = 2


class EvalReport:
    """A JSON file with settings, versions, summary and rows, written whole each time.

    Args:
        path: the file; one that is there must be a report of the same settings and versions.
        settings: what was asked, in JSON's own types.
        versions: by package.

    Attributes:
        outcomes: what the file held of a run before.
        retained: the same of retention.
        complete: whether that run came to its end.

    Raises:
        ValueError: the file that is there is no report, or one of other settings or versions.
    """

    def __init__(self, path: Path, settings: Mapping, versions: Mapping[str, str]):
        self.path = path
        self._asked = json.loads(json.dumps({"settings": settings, "versions": versions}))
        self.outcomes: list[Outcome] = []
        self.retained: list[Retained] = []
        self.complete = False
        self.summary: dict | None = None
        if path.exists():
            self._read()

    def write(
        self,
        outcomes: Sequence[Outcome],
        retained: Sequence[Retained] = (),
        summary: Mapping | None = None,
    ) -> None:
        """Replace the file; with a summary it is complete."""
        content = {
            "format": FORMAT,
            **self._asked,
            "summary": summary,
            "retention": [item._asdict() for item in retained],
            "rows": [asdict(outcome) for outcome in outcomes],
        }
        write_json(self.path, content)

    def _read(self) -> None:
        try:
            content = read_json(self.path)
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}")
            found = {name: content[name] for name in self._asked}
            others = [
                name
                for part, asked in self._asked.items()
                for name in {**asked, **found[part]}
                if (name in asked, asked.get(name)) != (name in found[part], found[part].get(name))
            ]
            self.outcomes = [Outcome.read(row) for row in content["rows"]]
            self.retained = [Retained(**item) for item in content["retention"]]
            self.summary = content["summary"]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"report: expected a new file or an evaluation's report, got {str(self.path)!r} ({error})"
            ) from None
        if others:
            raise ValueError(
                f"report: expected one of the same settings to go on with, got {str(self.path)!r}, "
                f"which differs in {', '.join(others)}"
            )
        self.complete = self.summary is not None
