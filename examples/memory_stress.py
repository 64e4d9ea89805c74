"""Processes that write, forget and ask in one memory folder at once, some of which are killed on the way.

    python examples/memory_stress.py --minutes 5 --processes 8

What a process reports, it does not say before the call has returned. In the end every reported write must be
there, every reported forget be gone, no bytes of a forgotten latent lie in the folder, nothing be left beside
the memory, and the state be that of a memory written anew. No model is needed: a latent is random, by
its id.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from torch import Tensor

from engram_kernels.memory import EpisodicMemory

SLOTS, LATENT = 128, 384
# A process forgets as soon as it has more facts than that.
FACTS = 20
SOUND = {"README.md", "memory.safetensors", ".lock"}


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        done: reported operations by kind.
        killed: processes that were killed, and how many of them in the middle of a change.
        seconds: of the changes.
        faults: sentences; none, if all went well.
    """

    done: Counter = field(default_factory=Counter)
    killed: int = 0
    interrupted: int = 0
    seconds: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def latent(name: str) -> Tensor:
    """The latent of a fact, [1, LATENT]."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    return torch.randn(1, LATENT, generator=torch.Generator().manual_seed(seed))


def new_memory() -> EpisodicMemory:
    return EpisodicMemory(SLOTS, LATENT, ridge="loo")


class Journal:
    """What one process reports, a line each, and what it was about to do when it was killed."""

    def __init__(self, path: Path):
        self.path = path

    def say(self, **line) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def state(self) -> tuple[set[str], set[str], dict | None]:
        """The ids that were written and are there, those that were forgotten, and a change without an end."""
        there, gone, begun = set(), set(), None
        for line in self.lines():
            if line["say"] == "begin":
                begun = line
            elif line["say"] == "end":
                there = (there | set(line["write"])) - set(line["forget"])
                gone |= set(line["forget"])
                begun = None
            elif line["say"] == "undone":
                begun = None
        return there, gone, begun


def work(folder: Path, journal: Journal, worker: int, generation: int, until: float, patience: float) -> None:
    """Write, forget and ask until the time is over."""
    torch.set_num_threads(1)
    dice = random.Random(1000 * worker + generation)
    there, gone, begun = journal.state()
    number = sum(len(line.get("write", ())) for line in journal.lines()) + 1000 * generation
    try:
        if begun:
            settle(folder, journal, begun)
            there, gone, _ = journal.state()
        while time.time() < until:
            if dice.random() < 0.4:
                ask(folder, there, gone, dice)
                journal.say(say="ask")
                continue
            write, forget = [], []
            if there and (len(there) > FACTS or dice.random() < 0.4):
                forget = dice.sample(sorted(there), min(len(there), dice.choice((1, 1, 2))))
            else:
                write = [f"{worker}-{number + i}" for i in range(dice.choice((1, 1, 3)))]
                number += len(write)
            journal.say(say="begin", write=write, forget=forget)
            started = time.perf_counter()
            with EpisodicMemory.open(folder, new=new_memory) as memory:
                memory.forget(ids=forget)
                if write:
                    latents = torch.cat([latent(name) for name in write])
                    memory.write(latents, ids=write, texts=[f"fact {name}" for name in write])
            journal.say(say="end", write=write, forget=forget, seconds=time.perf_counter() - started)
            there = (there | set(write)) - set(forget)
            gone |= set(forget)
            time.sleep(dice.random() * patience)
    except Exception as error:
        journal.say(say="fault", what=f"process {worker}: {type(error).__name__}: {error}")


def settle(folder: Path, journal: Journal, begun: dict) -> None:
    """Find out whether a change that was killed on its way was done: all of it, or nothing."""
    ids = (
        set(EpisodicMemory.from_pretrained(folder).ids) if (folder / "memory.safetensors").exists() else set()
    )
    done = [name in ids for name in begun["write"]] + [name not in ids for name in begun["forget"]]
    if all(done):
        journal.say(say="end", write=begun["write"], forget=begun["forget"], seconds=None)
    elif not any(done):
        journal.say(say="undone")
    else:
        journal.say(say="fault", what=f"half of a change was done: {begun}")


def ask(folder: Path, there: set[str], gone: set[str], dice: random.Random) -> None:
    """Read the memory, and check what this process knows of it."""
    if not there and not gone:
        return
    memory = EpisodicMemory.from_pretrained(folder)
    ids = set(memory.ids)
    if there - ids:
        raise AssertionError(f"reported as written, and not there: {sorted(there - ids)}")
    if gone & ids:
        raise AssertionError(f"reported as forgotten, and there: {sorted(gone & ids)}")
    if there:
        name = dice.choice(sorted(there))
        best = memory.recall(latent(name), top=1)[0][0]
        if best.name != name or not best.known:
            raise AssertionError(f"asked for {name}, got {best.name}")


def stress(
    folder: Path, journals: Path, seconds: float, processes: int, seed: int, patience: float = 0.2
) -> Outcome:
    """Let processes work in a folder, kill some, and check what is left.

    Args:
        folder: of the memory; it need not be there.
        journals: a folder for what they report.
        seconds: how long.
        processes: how many at once.
        seed: of when which one is killed.
        patience: seconds that a process waits between two changes, at most.
    """
    context = multiprocessing.get_context("fork")
    dice, outcome, until = random.Random(seed), Outcome(), time.time() + seconds
    kept = [Journal(journals / str(worker)) for worker in range(processes)]
    running = {}

    def start(worker: int, generation: int, until: float) -> None:
        arguments = (folder, kept[worker], worker, generation, until, patience)
        running[worker] = context.Process(target=work, args=arguments), generation
        running[worker][0].start()

    for worker in range(processes):
        start(worker, 0, until)
    while time.time() < until:
        time.sleep(max(0.0, min(dice.expovariate(processes / 16), until - time.time())))
        worker = dice.randrange(processes)
        process, generation = running[worker]
        if process.is_alive() and time.time() < until:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            outcome.killed += 1
            outcome.interrupted += kept[worker].state()[2] is not None
            start(worker, generation + 1, until)
    for process, _ in running.values():
        process.join()
    check(folder, kept, outcome)
    return outcome


def check(folder: Path, journals: list[Journal], outcome: Outcome) -> None:
    """Compare what was reported with what is there."""
    there, gone = set(), set()
    for journal in journals:
        begun = journal.state()[2]
        if begun:
            settle(folder, journal, begun)
        mine, lost, _ = journal.state()
        there |= mine
        gone |= lost
        for line in journal.lines():
            if line["say"] == "fault":
                outcome.faults.append(line["what"])
            if line["say"] == "ask":
                outcome.done["ask"] += 1
            if line["say"] == "end":
                outcome.done["write"] += len(line["write"])
                outcome.done["forget"] += len(line["forget"])
                outcome.seconds += [line["seconds"]] if line["seconds"] is not None else []
    # As the next writer does: it clears away what one that was killed has left.
    with EpisodicMemory.open(folder, new=new_memory) as memory:
        ids = set(memory.ids)
    if there - ids:
        outcome.faults.append(f"{len(there - ids)} reported writes are not there, such as {min(there - ids)}")
    if ids - there:
        outcome.faults.append(
            f"{len(ids - there)} facts are there that should not, such as {min(ids - there)}"
        )
    left = {path.name for path in folder.iterdir()} - SOUND
    if left:
        outcome.faults.append(f"files were left: {sorted(left)}")
    content = b"".join(path.read_bytes() for path in folder.iterdir())
    known = [name for name in gone if latent(name).numpy().tobytes() in content]
    if known:
        outcome.faults.append(f"bytes of {len(known)} forgotten facts are there, such as {min(known)}")
    anew = new_memory()
    if ids:
        names = memory.ids
        anew.write(torch.cat([latent(name) for name in names]), ids=names)
        apart = float((memory.matrix() - anew.matrix()).norm() / anew.matrix().norm())
        if not apart < 1e-8:
            outcome.faults.append(f"M differs from that of a memory written anew by {apart:.1e} of its norm")


def main(
    minutes: Annotated[float, typer.Option(help="How long.")] = 5.0,
    processes: Annotated[int, typer.Option(min=1, help="How many at once.")] = 8,
    seed: Annotated[int, typer.Option(help="Of everything that is sampled.")] = 0,
) -> None:
    """Let processes write, forget and ask in one folder; print a table, and exit with 1 on any fault."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        journals = Path(place, "journals")
        journals.mkdir()
        outcome = stress(Path(place, "memory"), journals, 60 * minutes, processes, seed)
    rows = {
        "processes, minutes": f"{processes}, {minutes:g}",
        "reported writes": f"{outcome.done['write']:,}",
        "reported forgets": f"{outcome.done['forget']:,}",
        "questions": f"{outcome.done['ask']:,}",
        "processes killed (in a change)": f"{outcome.killed:,} ({outcome.interrupted:,})",
        "seconds a change with waiting, median, longest": (
            f"{median(outcome.seconds):.2f}, {max(outcome.seconds):.2f}" if outcome.seconds else ""
        ),
        "faults": f"{len(outcome.faults)}",
    }
    print("| | |\n|---|---:|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")
    for fault in outcome.faults:
        print(fault)
    raise typer.Exit(bool(outcome.faults))


if __name__ == "__main__":
    typer.run(main)
