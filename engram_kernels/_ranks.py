"""What the processes of one distributed run do together."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from .errors import EngramError

# For the rank that writes: at a gigabyte a second, three and a half terabytes.
WAIT = timedelta(hours=1)


def together() -> bool:
    """Whether this process is one of several of a run of torch.distributed."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def once(what: str, action: Callable[[], None], rank: int | None = None) -> None:
    """Do something on one rank; the others of the run wait for it, and have its outcome.

    No collective: a rank that comes alone does it by itself. Outside of torch.distributed that is every one.

    Args:
        what: names it, the same on every rank.
        action: what is done.
        rank: which one does it; None: the one that comes first.

    Raises:
        EngramError: another rank did it, and failed or ended.
    """
    if not together():
        return action()
    store = dist.PrefixStore("engram_kernels", dist.distributed_c10d._get_default_store())
    key = f"{what}, time {store.add(f'{what}, rank {dist.get_rank()}', 1)}"
    mine = store.add(key, 1) == 1 if rank is None else dist.get_rank() == rank
    if mine:
        try:
            action()
        except BaseException as error:
            store.set(f"{key}, outcome", str(error) or type(error).__name__)
            raise
        store.set(f"{key}, outcome", "")
        return
    try:
        store.wait([f"{key}, outcome"], WAIT)
    except RuntimeError as error:
        raise EngramError(
            f"group: expected another rank to {what} within {WAIT}, got no word of it"
        ) from error
    if outcome := store.get(f"{key}, outcome").decode():
        raise EngramError(outcome)
