"""Whether checks of data wait for the device: now, later, or never."""

import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .. import _checks as check
from ..errors import EngramError

__all__ = ["checks", "synchronize_checks"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

MODES = ("sync", "async", "off")
# So many flags may wait to be read: then the next one waits for the device, and reads them all.
_MOST = 4096

_mode: list[str | None] = [None]
_blocks = threading.local()
# What is to be read.
flags: list[tuple[Tensor, str]] = []
_lock = threading.Lock()


class checks:
    """Choose how operators check data: for the process from here on, or for a thread inside a `with` block.

    - "sync": before anything is written, and with the culprit named; a GPU is waited for.
    - "async": on the device. Where data cannot be used an operator that works in place leaves its tensors as
      they are (but for the sign of zeros); the others give what comes of it. `synchronize_checks` raises, or
      the next call that waits anyway.
    - "off": not at all.

    Shapes, types, devices and shared memory are checked in each mode. Default: "sync" on CPUs, "async" on
    GPUs.

    Args:
        mode: "sync", "async" or "off"; None is the default of each device.

    Raises:
        ValueError: another mode.

    Example:
        >>> ek.checks("sync")  # from here on
        >>> with ek.checks("async"):
        ...     for layer in layers:
        ...         ek.apply_low_rank_(layer.weight, left, right)
        ...     ek.synchronize_checks()
    """

    def __init__(self, mode: str | None):
        known = mode is None or mode in MODES
        check.expect(known, "mode", f"one of {', '.join(MODES)}, or None", repr(mode))
        self._mode = mode
        self._before, _mode[0] = _mode[0], mode

    def __enter__(self) -> None:
        _mode[0] = self._before
        _blocks.modes = [*getattr(_blocks, "modes", ()), self._mode]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _blocks.modes = _blocks.modes[:-1]

    def __repr__(self) -> str:
        return f"checks({self._mode!r})"


def raises_at_once(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Make the decorated function's operators raise at once: what it does next rests on their success."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with checks("sync"):
            return function(*args, **kwargs)

    return run


def mode_for(device: str) -> str:
    """Return the mode of checks on a type of device; "off" while a CUDA graph is captured."""
    if device == "cuda" and torch.cuda.is_current_stream_capturing():
        return "off"
    blocks = getattr(_blocks, "modes", None)
    return (blocks[-1] if blocks else _mode[0]) or ("sync" if device == "cpu" else "async")


def later(flag: Tensor | bool, complaint: str) -> None:
    """Keep a flag, not 0 where something is wrong, and what is to be said then."""
    if flag is False:
        return
    with _lock:
        flags.append((torch.as_tensor(flag), complaint))
    if len(flags) >= _MOST:
        synchronize_checks()


def synchronize_checks() -> None:
    """Wait for the checks of mode "async", and raise what they found.

    Raises:
        EngramError: data that an operator could not use, since the last time; the first such call is named.

    Example:
        >>> ek.apply_low_rank_(weight, left, right)
        >>> ek.synchronize_checks()
    """
    with _lock:
        taken, flags[:] = flags[:], []
    found: list[str] = []
    for device in dict.fromkeys(flag.device for flag, _ in taken):
        mine = [(flag, complaint) for flag, complaint in taken if flag.device == device]
        wrong = torch.stack([flag.reshape(()).bool() for flag, _ in mine]).tolist()
        found += [complaint for (_, complaint), is_wrong in zip(mine, wrong, strict=True) if is_wrong]
    if found:
        others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise EngramError(f"{found[0]}{others}; ek.checks('sync') names it where it happens")
