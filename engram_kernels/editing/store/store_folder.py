"""The files of a store of edits: a list that names folders, a lock, and nothing half done."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from ..._io import file_checksum, read_sealed, write_sealed
from ...errors import EngramError, naming
from ...hf.loading import writable_directory
from ..methods import Method
from ..saving.files import REPORT
from ..saving.result import EditResult
from ..search.gradients import GradientOptions
from ..search.values import ValueOptions
from ..statistics.statistics import PARTIAL, load_moment

FORMAT = 2
_OWN = ("statistics", "edits", "pending")


class StoreFolder:
    """A folder with `store.json`, which says what the others hold: a folder that it does not name is none.

    Args:
        directory: of a store, or a new one.
        timeout: seconds to wait for another writer.

    Attributes:
        manifest: what `store.json` said when it was read; None where there is none.

    Raises:
        EngramError: the folder cannot be written.
    """

    def __init__(self, directory: Path, timeout: float):
        self.path = writable_directory(directory, "directory")
        self.manifest: dict | None = None
        self._lock = FileLock(self.path / ".lock", timeout=timeout)

    @property
    def entries(self) -> list[dict]:
        """Of each call that is kept: its folder, and the numbers of its edits."""
        return self.manifest["entries"] if self.manifest else []

    @property
    def ids(self) -> list[int]:
        """The numbers of all edits, in the order of their writes."""
        return [number for entry in self.entries for number in entry["ids"]]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep all other writers waiting, and read what they left.

        Raises:
            EngramError: another process holds the lock, or `store.json` is none.
        """
        try:
            self._lock.acquire()
        except Timeout:
            raise EngramError(
                f"directory: expected a store that no other process writes, got {str(self.path)!r}, "
                f"locked for {self._lock.timeout:g} seconds"
            ) from None
        try:
            self._read()
            yield
        finally:
            self._lock.release()

    def _read(self) -> None:
        path = self.path / "store.json"
        if not path.exists():
            # A first call that was killed leaves some of our own.
            names = [one.name for one in self.path.iterdir()]
            if any(not name.startswith(".") and name not in _OWN for name in names):
                raise EngramError(
                    f"directory: expected an empty one or a store's, got {str(self.path)!r}, "
                    "which holds something else and no store.json"
                )
            return
        try:
            manifest = read_sealed(path)
            if manifest["format"] != FORMAT:
                raise ValueError(f"format {manifest['format']}, not {FORMAT}")
            method_from(manifest["method"])
            for entry in manifest["entries"]:
                texts = isinstance(entry["folder"], str) and isinstance(entry["checksum"], str)
                if not texts or not all(type(id) is int for id in entry["ids"]):
                    raise ValueError(f"an entry {entry}")
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise EngramError(
                f"directory: expected a store's store.json, got {str(path)!r} ({error})"
            ) from error
        self.manifest = manifest

    def begin(self, **settings: object) -> None:
        """Make a store without edits."""
        self._write({"format": FORMAT, **settings, "next": 1, "folders": 0, "entries": []})

    def check_statistics(self) -> None:
        """Read the statistics, on which all edits to come depend; those of a pass cut off are its own affair.

        Raises:
            EngramError: a file is spoilt.
        """
        with naming("directory", "cache_dir"):
            for path in sorted((self.path / "statistics").rglob("*.safetensors")):
                if not path.name.endswith(PARTIAL):
                    load_moment(path, anew=False)

    def load(self, entry: dict) -> EditResult:
        """The edits of an entry.

        Raises:
            EngramError: they are missing or spoilt.
        """
        folder = self.path / "edits" / entry["folder"]
        result = EditResult.from_pretrained(folder)
        # Whole, but of another store or of another time.
        if file_checksum(folder / REPORT) != entry["checksum"]:
            raise EngramError(f"directory: expected in {str(folder)!r} the edits that were kept, got others")
        return result

    def keep(self, before: list[dict], ids: list[int], result: EditResult | None) -> None:
        """Save a result, then name it behind some entries: from that moment on these count, and no others."""
        (self.path / "edits").mkdir(exist_ok=True)
        self._sweep()
        manifest = {**(self.manifest or {}), "entries": list(before)}
        if result is not None:
            manifest["folders"] += 1
            manifest["next"] = max(manifest["next"], 1 + max(ids))
            name = f"{manifest['folders']:06d}"
            folder = self.path / "edits" / name
            result.save_pretrained(folder)
            entry = {"folder": name, "ids": ids, "checksum": file_checksum(folder / REPORT)}
            manifest["entries"].append(entry)
        self._write(manifest)
        self._sweep()
        shutil.rmtree(self.path / "pending", ignore_errors=True)

    def _write(self, manifest: dict) -> None:
        write_sealed(self.path / "store.json", manifest)
        self.manifest = manifest

    def _sweep(self) -> None:
        """Delete what is not named: of calls that were killed, or that were replaced."""
        named = {entry["folder"] for entry in self.entries}
        for path in (self.path / "edits").iterdir():
            if path.name not in named:
                shutil.rmtree(path, ignore_errors=True)


def method_plain(method: Method) -> dict:
    """A method as JSON holds it."""
    suppress = None if method.suppress is None else list(method.suppress)
    return {**asdict(method), "preserve": repr(method.preserve), "suppress": suppress}


def method_from(plain: dict) -> Method:
    """The method that `method_plain` wrote."""
    preserve = {"True": True, "False": False}.get(plain["preserve"])
    preserve = float(plain["preserve"]) if preserve is None else preserve
    suppress = None if plain["suppress"] is None else tuple(plain["suppress"])
    changed = {"preserve": preserve, "suppress": suppress, "value": ValueOptions(**plain["value"])}
    changed["gradient"] = GradientOptions(**plain["gradient"])
    return Method(**{**plain, **changed})
