"""A file in a folder that one process at a time replaces, whole, and whose old bytes are overwritten."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from ..errors import EngramError

FILE = "memory.safetensors"
LOCK = ".lock"
# Fixed names: a writer that was killed leaves at most these, and the next one overwrites and removes them.
NEW, OLD = ".memory.new", ".memory.old"
# Seconds to wait for other writers.
PATIENCE = 60.0
_ZEROS = bytes(1 << 20)

Result = TypeVar("Result")


def is_new(folder: Path) -> bool:
    """Whether there is no folder, or nothing in it but what a writer left that never got to the end."""
    return not folder.exists() or (
        folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK, NEW, OLD}
    )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the disk says into a sentence about the directory."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise EngramError(
            f"directory: expected one that can be written, got {str(folder)!r} ({reason})"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only writer of a folder, and clear away what one that was killed has left.

    Raises:
        EngramError: another one did not end for a minute, or the folder cannot be written.
    """
    # One lock for all who ask in this thread: a memory may be saved while it is held open.
    lock = FileLock(folder / LOCK, timeout=PATIENCE, is_singleton=True)
    with writing(folder):
        try:
            lock.acquire(poll_interval=0.01)
        except Timeout as error:
            raise EngramError(
                f"directory: expected {str(folder)!r} to be free within {PATIENCE:.0f} seconds, got another "
                "process that writes to it"
            ) from error
    try:
        with writing(folder):
            _clear(folder)
        yield
    finally:
        lock.release()


def exchange(folder: Path, write: Callable[[Path], Result]) -> Result:
    """Replace the file by what `write` writes, and return what it returns; the caller holds the lock.

    At every moment the folder has the old file or the new one. On return the new one is on the disk, and the
    bytes of the old one are overwritten.

    Raises:
        EngramError: the folder cannot be written.
    """
    new = folder / NEW
    with writing(folder):
        try:
            result = write(new)
            _to_disk(new)
            # A second name, by which the next writer finds the old bytes if this one is killed before the
            # end. Where a file system has no links, they are dropped without being overwritten.
            with suppress(OSError):
                os.link(folder / FILE, folder / OLD, follow_symlinks=False)
            os.replace(new, folder / FILE)
            _to_disk(folder)
        finally:
            _clear(folder)
    return result


def read(path: Path, parse: Callable[[bytes], Result]) -> Result:
    """Parse a file's bytes, of one moment: again, if it was replaced while it was read.

    Raises:
        OSError: it cannot be read.
        Exception: what `parse` raises.
    """
    while True:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError("no file")  # A pipe would keep its reader waiting.
        with open(path, "rb") as file:
            opened = _identity(os.fstat(file.fileno()))
            try:
                # Not under a name here: `parse` lets go of them, before it makes more of them.
                return parse(file.read())
            except Exception:
                # The bytes of a file that was replaced are overwritten under its readers.
                if _identity(os.stat(path)) == opened:
                    raise


def _clear(folder: Path) -> None:
    for name in (NEW, OLD):
        _shred(folder / name)


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _shred(path: Path) -> None:
    """Overwrite a file with zeros, and remove it; nothing if there is none.

    One that has another name too is only removed: it is the folder's own file, or somebody's copy.
    """
    if path.is_symlink():
        path.unlink()
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        return
    with open(descriptor, "wb", buffering=0) as file:
        stat = os.fstat(descriptor)
        if stat.st_nlink == 1:
            for start in range(0, stat.st_size, len(_ZEROS)):
                file.write(_ZEROS[: stat.st_size - start])
            os.fsync(descriptor)
    path.unlink()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
