"""The file of a run: machine, rates, stages and measured cases, as JSON that is rewritten at every step.

    python bench/results.py begin FILE COMMAND        a new file
    python bench/results.py stage FILE NAME STATUS SECONDS DETAIL
    python bench/results.py values FILE JSON          keep what bench_values.py wrote
    python bench/results.py name DEVICE COMMIT           what to call it

Needs nothing but Python: it must work where the package does not build.
"""

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

FORMAT = 1
STATUSES = ("passed", "failed", "cut", "skipped")


def empty(command: str = "") -> dict:
    """A run that has measured nothing yet."""
    begun = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        "format": FORMAT,
        "begun": begun,
        "command": command,
        "machine": {},
        "rates": {},
        "clocks": [],
        "stages": [],
        "resources": [],
        "values": {},
        "cases": [],
    }


def load(path: str | os.PathLike) -> dict:
    """Read a file of results.

    Raises:
        ValueError: it is of another format, or a part is missing.
    """
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"path: expected results of format {FORMAT}, got {str(path)!r}")
    if missing := [part for part in empty() if part not in found]:
        raise ValueError(f"path: expected results with {', '.join(missing)}, got {str(path)!r}")
    return found


@contextmanager
def changed(path: str | os.PathLike) -> Iterator[dict]:
    """Yield what a file holds (a new run if there is none); write it back whole at the end of the block."""
    path = Path(path)
    found = load(path) if path.exists() else empty()
    yield found
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        temporary.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def name_of(device: str, commit: str) -> str:
    """Return the file's name: `h200-1a2b3c4.json`.

    Example:
        >>> name_of("NVIDIA H100 80GB HBM3", "1a2b3c4")
        'h100-80gb-hbm3-1a2b3c4.json'
    """
    words = re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia")).strip("-")
    return f"{words or 'unknown'}-{commit}.json"


def begin(path: str, command: str) -> None:
    Path(path).unlink(missing_ok=True)
    with changed(path) as run:
        run["command"] = command


def stage(path: str, name: str, status: str, seconds: str, detail: str = "") -> None:
    """Keep how a stage ended; one that is run again takes its old place."""
    if status not in STATUSES:
        raise ValueError(f"status: expected one of {', '.join(STATUSES)}, got {status!r}")
    with changed(path) as run:
        run["stages"] = [old for old in run["stages"] if old["name"] != name]
        run["stages"].append({"name": name, "status": status, "seconds": float(seconds), "detail": detail})


def values(path: str, source: str) -> None:
    with changed(path) as run:
        run["values"] = json.loads(Path(source).read_text(encoding="utf-8"))


if __name__ == "__main__":
    commands = {
        "begin": begin,
        "stage": stage,
        "values": values,
        "name": lambda *words: print(name_of(*words)),
    }
    commands[sys.argv[1]](*sys.argv[2:])
