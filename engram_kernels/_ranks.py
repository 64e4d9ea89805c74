"""What the processes of one distributed run do together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor

from .errors import EngramError

T = TypeVar("T")

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


class _Failure(NamedTuple):
    """What went wrong on a rank."""

    words: str


class Ranks:
    """Processes that make one result together, each of them a part. A group of None is this process alone.

    Every rank makes the same calls in the same order. What fails on one is raised on all.

    Args:
        group: of torch.distributed, or None.
        mirror: of the processes that divide a model among them, and run in step with this one.

    Attributes:
        rank: of this process, from 0.
        size: the number of processes.
        mirror: the ranks that run in step with this one.
        everyone: all that decide together: the group and what mirrors it, or these alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, mirror: dist.ProcessGroup | None = None):
        if not (group is None or isinstance(group, dist.ProcessGroup)):
            kind = type(group).__name__
            raise TypeError(
                f"group: expected one of torch.distributed that this rank is in, or None, got {kind}"
            )
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._told: Exception | None = None
        self.mirror: Ranks = Ranks(mirror) if mirror is not None else ALONE if group is not None else self
        self.everyone: Ranks = self
        if mirror is not None:
            self.everyone = Ranks(dist.group.WORLD) if self.size > 1 else self.mirror

    def each(self, action: Callable[[], T]) -> list[T]:
        """Do something on every rank.

        Returns:
            What it gave on each of them.

        Raises:
            EngramError: it failed on another one.
        """
        if self.size == 1:
            return [action()]
        failed: Exception | None = None
        outcome: T | _Failure
        try:
            outcome = action()
        except Exception as error:
            failed, outcome = error, _Failure(str(error) or type(error).__name__)
        outcomes: list = [None] * self.size
        with _all_there():
            dist.all_gather_object(outcomes, outcome, group=self.group)
        error = failed or next(
            (EngramError(one.words) for one in outcomes if isinstance(one, _Failure)), None
        )
        if error is not None:
            self._told = error
            raise error
        return outcomes

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Tell the others of an error in the block, which they raise when they next do something together."""
        try:
            yield
        except Exception as error:
            if self.size > 1 and error is not self._told:
                with suppress(EngramError):
                    self.each(partial(_raise, error))
            raise

    def own(self, action: Callable[[], T]) -> T:
        """Do something on every rank, and return what it gave here; what fails on one is raised on all."""
        kept: list[T] = []
        self.each(lambda: kept.append(action()))
        return kept[0]

    def decided(self, action: Callable[[], T]) -> T:
        """What something gives on rank 0, which alone does it."""
        return self.each(lambda: action() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def check_same(self, name: str, value: object) -> None:
        """Make sure that a value is the same on all ranks.

        Raises:
            EngramError: it is not; the sentence names the argument.
        """
        values = self.each(lambda: value)
        others = [rank for rank, other in enumerate(values) if other != values[0]]
        if others:
            raise EngramError(
                f"{name}: expected the same on all ranks, got others on rank {others[0]} than on 0"
            )

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add the tensors of all ranks, in place on each."""
        if self.size > 1:
            with _all_there():
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Give a tensor of rank 0 to the others, in place."""
        if self.size > 1:
            with _all_there():
                dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def mine(self, costs: Sequence[float]) -> list[int]:
        """Which of some tasks are this rank's: the dearest first, each to the rank with least to do."""
        loads, owners = [0.0] * self.size, {}
        for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
            owners[task] = loads.index(min(loads))
            loads[owners[task]] += costs[task]
        return [task for task in range(len(costs)) if owners[task] == self.rank]


ALONE = Ranks()


def _raise(error: Exception) -> None:
    raise error


@contextmanager
def _all_there() -> Iterator[None]:
    """Say in a sentence that another process ended, which its backend says in its own words."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise EngramError(f"group: expected all its ranks to the end, got one lost ({reason})") from error
