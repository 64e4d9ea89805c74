"""Files and folders that are written whole or not at all."""

import codecs
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ._hashing import digest, tensor_checksum
from ._ranks import once
from .errors import EngramError

Made = TypeVar("Made")

# What names a text's encoding. UTF-32 first: its mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


@contextmanager
def system_errors() -> Iterator[None]:
    """Let a full disk be an `OSError`, whoever writes: safetensors has errors of its own."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


@contextmanager
def new_directory(directory: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder beside `directory`, and give it that name at the end of the block.

    Raises:
        EngramError: the directory exists and is not empty, or cannot be written.
        OSError: the block's own, of a file that lies elsewhere.
    """
    directory = Path(directory)
    temporary = None
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise EngramError(f"directory: expected a new or empty one, got {str(directory)!r}")
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        os.chmod(temporary, 0o755)
        with system_errors():
            yield temporary
        temporary.rename(directory)
    except OSError as error:
        named = [Path(str(name)) for name in (error.filename, error.filename2) if name]
        if temporary and named and not any(name.is_relative_to(temporary) for name in named):
            raise  # The block's, of a file elsewhere: the directory is not to blame.
        reason = error.strerror or error
        raise EngramError(
            f"directory: expected one that can be written, got {str(directory)!r} ({reason})"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_directory(
    directory: str | os.PathLike, write: Callable[[Path], None], rank: int | None = None
) -> None:
    """Fill a new folder, which then has its name; of the ranks of a run that name it, one writes it.

    Args:
        directory: a new or empty one.
        write: writes into the folder that it is given.
        rank: which one writes; None: the one that comes first.

    Raises:
        EngramError: as `new_directory`; every rank that names the folder raises it.
    """

    def fill() -> None:
        with new_directory(directory) as folder:
            write(folder)

    once(f"write {os.path.abspath(directory)}", fill, rank)


@contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and give what was written there that name at the end.

    Raises:
        OSError: it cannot be written; its file is `path`.
    """
    path = Path(path)
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder, system_errors():
            temporary = Path(folder) / path.name
            yield temporary
            os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def let_all_read(folder: Path) -> None:
    """Make a folder and all files below it readable for everyone: safetensors writes for the owner alone."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors of any device and layout to a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    with new_file(path) as temporary:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        # safetensors writes for the owner alone; a folder may be shared, as far as the user's umask says.
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(plain, temporary, None if metadata is None else dict(metadata))
        temporary.chmod(mode)


def save_sealed_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None
) -> None:
    """Write tensors and some words about them, with a checksum of both, whole or not at all."""
    save_tensors(path, tensors, {**(about or {}), "checksum": _tensors_checksum(tensors, about or {})})


def load_sealed_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_sealed_tensors` wrote: tensors and words of which not a bit has changed.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is incomplete or was changed; the message names it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = dict(file.metadata() or {})
            # Copies: the last bits of a product depend on how its factors are aligned.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{Path(path).name} is incomplete or was changed: {error}") from error
    checksum = about.pop("checksum", None)
    if checksum != _tensors_checksum(tensors, about):
        kind = "missing" if checksum is None else "another"
        raise ValueError(f"{Path(path).name} is incomplete or was changed: its checksum is {kind}")
    return tensors, about


def load_cached(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The same of a file that can be made again: None if it is missing or, with a warning, spoilt."""
    try:
        return load_sealed_tensors(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warnings.warn(f"{os.fspath(path)!r} cannot be used, and is made again ({error})", stacklevel=2)
        return None


def _tensors_checksum(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    return digest({name: tensor_checksum(tensors[name]) for name in sorted(tensors)}, sorted(about.items()))


def write_tensor_folder(
    directory: str | os.PathLike, kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, str]
) -> None:
    """Write tensors, and some words about them, into a new folder: all of it or nothing.

    Args:
        directory: a new or empty one.
        kind: what it holds, such as "covariance"; `read_tensor_folder` accepts no other.
        tensors: by name.
        about: what else is to be known.

    Raises:
        EngramError: the directory is not empty or cannot be written.
    """
    with new_directory(directory) as folder:
        about = {"format": f"engram_kernels.{kind}", **about}
        save_sealed_tensors(folder / f"{kind}.safetensors", tensors, about)


def read_tensor_folder(
    directory: str | os.PathLike,
    kind: str,
    made: Callable[[dict[str, Tensor], dict[str, str]], Made],
    device: torch.device | str,
) -> Made:
    """Read a folder that `write_tensor_folder` wrote.

    Args:
        directory: the folder.
        kind: what it holds.
        made: of the tensors, on the device, and of what is about them.
        device: where the tensors shall lie.

    Raises:
        ValueError: torch knows no such device.
        EngramError: the folder holds nothing of the kind.
    """
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected one that torch knows, got {device!r}") from error
    expected = f"directory: expected a {kind}, got {os.fspath(directory)!r}"
    try:
        tensors, about = load_sealed_tensors(Path(directory) / f"{kind}.safetensors")
        if about.get("format") != f"engram_kernels.{kind}":
            raise EngramError(f"{expected} of another format")
        return made({name: tensor.to(device) for name, tensor in tensors.items()}, about)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise EngramError(f"{expected}: {error}") from error


def encoding_of(content: bytes) -> str:
    """The Unicode encoding that the bytes of a text name by a mark at their beginning, or UTF-8."""
    return next((encoding for mark, encoding in _MARKS if content.startswith(mark)), "utf-8")


def write_json(path: str | os.PathLike, content: object) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        ValueError: the content has something that JSON has not, such as NaN.
    """
    text = _json(content)
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike) -> object:
    """Read a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or is nested deeper than anything that is written here.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise ValueError(f"{os.fspath(path)!r} is nested too deeply") from error


def write_sealed(
    path: str | os.PathLike,
    content: Mapping[str, object],
    files: Iterable[str] = (),
    checksums: Mapping[str, str] | None = None,
) -> None:
    """Write a JSON file with checksums of itself and of files beside it, whole or not at all.

    Args:
        path: of the JSON file.
        content: anything but the names `files` and `checksum`, which are added.
        files: names of files in the same folder or below it, with `/`; they are there already.
        checksums: of all files, by name, where they are known; then they are not read.

    Raises:
        OSError: a file cannot be read, or the JSON file not written.
        ValueError: the content has something that JSON has not, such as NaN.
    """
    folder = Path(path).parent
    if checksums is None:
        checksums = {name: file_checksum(folder / name) for name in files}
    sealed = {**content, "files": dict(checksums)}
    write_json(path, {**sealed, "checksum": _checksum(sealed)})


def read_sealed(path: str | os.PathLike) -> dict:
    """Read what `write_sealed` wrote: not a byte of the JSON file or of those that it lists has changed.

    Returns:
        The content, and `files`, the checksums by name.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is incomplete or was changed; the message names it.
    """
    path = Path(path)
    content = read_json(path)
    # The text too: with two entries of one name, JSON's reader would take the second and say nothing.
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("files"), dict)
        or path.read_bytes() != _json(content).encode()
        or content.pop("checksum", None) != _checksum(content)
    ):
        raise ValueError(f"{path.name} is incomplete or was changed: its checksum is another")
    for name, checksum in content["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{path.name} lists {name!r}, which is not in its folder")
        if file_checksum(path.parent / name) != checksum:
            raise ValueError(
                f"{name} is incomplete or was changed: its checksum is not the one in {path.name}"
            )
    return content


def file_checksum(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's bytes, read piece by piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _json(content: object) -> str:
    try:
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"content: expected finite numbers, texts, lists and mappings ({error})") from error


def _checksum(content: Mapping[str, object]) -> str:
    return hashlib.sha256(_json(content).encode()).hexdigest()
