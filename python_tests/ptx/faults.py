"""Faults put into the PTX of every kernel, one at a time, and what finds them: `python -m ptx.faults`.

A fault is caught if the machine stops, or if a result misses the rules that the operators' tests hold it to.
"""

import argparse
import copy
import importlib
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map

from . import fault_cases, library, plugin
from .coverage import opcode
from .fault_cases import Case
from .library import Instruction, Machine
from .summary import demangled

KINDS = ("misaligned", "further", "bound", "barrier", "fence", "wait", "rounding")
# Kinds of which a kernel has only such that change nothing, see README.md.
EQUIVALENT: dict[str, tuple[str, ...]] = {}
# What depends on the order of threads is tried in several.
SEEDS = {"barrier": (1, 2, 3), "fence": (1, 2, 3), "wait": (1, 2, 3)}


class Fault(NamedTuple):
    kind: str
    opcode: str = ""  # in place of the instruction's own
    shift: int = 0  # bytes that its address is further


def possible(text: str) -> Iterator[Fault]:
    """The faults that an instruction can have."""
    op = opcode(text)
    parts = op.split(".")
    if op.startswith("bar.sync"):
        yield Fault("barrier", "nop")
    if op.startswith("membar"):
        yield Fault("fence", "nop")
    for order in {"release", "acquire"}.intersection(parts):
        yield Fault("fence", op.replace(order, "relaxed"))
    if op.startswith("cp.async.wait"):
        yield Fault("wait", "nop")
    if parts[0] == "setp" and parts[2][0] in "su":
        neighbour = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}.get(parts[1])
        if neighbour:
            yield Fault("bound", ".".join([parts[0], neighbour, *parts[2:]]))
    if parts[0] in ("ld", "st") and "param" not in parts:
        vector = next((int(part[1]) for part in parts if part in ("v2", "v4")), 1)
        size = int(re.search(r"\d+$", op).group()) // 8
        if vector * size > size:
            yield Fault("misaligned", shift=size)
        yield Fault("further", shift=vector * size)
    if parts[0] == "cvt" and parts[1] == "rn" and parts[2] in ("bf16", "bf16x2", "f16", "f16x2"):
        yield Fault("rounding", op.replace(".rn.", ".rz."))


class Trial:
    """Runs cases on the machine and holds them to the reference."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.table = importlib.import_module("engram_kernels.backends")._table
        self.rules = importlib.import_module("accuracy")

    def outputs(self, case: Case, backend: str, arguments: tuple) -> list[torch.Tensor]:
        result = self.table[case.operator][backend].function(*arguments)
        return [leaf for leaf in tree_leaves((result, arguments)) if isinstance(leaf, torch.Tensor)]

    def prepare(self, case: Case) -> tuple[Case, list, list]:
        """Return a case with fixed arguments, the reference in their types, and that in fp64."""
        arguments = case.arguments()
        fixed = case._replace(arguments=lambda: copy.deepcopy(arguments))
        widened = tree_map(
            lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x,
            fixed.arguments(),
        )
        return (
            fixed,
            self.outputs(fixed, "torch", fixed.arguments()),
            self.outputs(fixed, "torch", widened),
        )

    def verdict(self, prepared: tuple[Case, list, list]) -> str | None:
        """Return what is wrong with a run, or None."""
        case, eager, truth = prepared
        try:
            got = self.outputs(case, case.backend, case.arguments())
        except (library.Fault, RuntimeError) as error:
            words = r"race|bounds|misaligned|undefined|deadlock|limit|still writing|barrier|wait|null"
            found = re.search(words, str(error))
            return found.group() if found else str(error)[:60]
        for mine, reference, exact in zip(got, eager, truth, strict=True):
            if case.exact or not mine.is_floating_point():
                if not torch.equal(mine, reference):
                    return "wrong result"
                continue
            if not mine.isfinite().all():
                return "wrong result"
            own = self.rules.rounding(self.rules.compute_dtype(mine), 64)
            own = max(2 * self.rules.error(reference, exact), own)
            if self.rules.error(mine, exact) > own:
                return "wrong result"
            try:
                self.rules.check_rounded_once(mine, exact)
            except AssertionError:
                return "rounding"
        return None

    def search(self, kind: str, prepared: list[tuple[Case, list, list]]) -> str | None:
        """Return what is wrong with the first of several runs that goes wrong, or None."""
        for case in prepared:
            for seed in SEEDS.get(kind, (1,)):
                self.machine.set_options(seed=seed)
                if found := self.verdict(case):
                    return found
        return None


class Outcome(NamedTuple):
    kernel: str
    kind: str
    found: str | None
    instruction: Instruction


def run(machine: Machine, each: int) -> Iterator[Outcome]:
    """Try `each` faults of a kind in each program, and more where none of them is caught."""
    torch.manual_seed(0)
    trial = Trial(machine)
    groups = defaultdict(list)
    for case in fault_cases.cases():
        groups[case.operator, case.backend].append(trial.prepare(case))
    for prepared in groups.values():
        done = set()
        for number, first in enumerate(prepared):
            machine.reset_counts()
            assert trial.verdict(first) is None, first
            listings = {i: machine.listing(i) for i in range(len(machine.kernels())) if i not in done}
            programs = {i: code for i, code in listings.items() if any(line.runs for line in code)}
            done.update(programs)
            for kernel, listing in programs.items():
                for faults in sampled(listing).values():
                    # The cases after the first, for what that has no lane or no size for.
                    yield from attempts(trial, kernel, listing, faults, prepared[number:], each)


def attempts(trial: Trial, kernel: int, listing: list, faults: list, cases: list, each: int):
    """Try faults of one kind in one program."""
    name, caught = trial.machine.kernels()[kernel], 0
    for tried, (places, fault) in enumerate(faults):
        # What orders threads is tried everywhere.
        if tried >= each and caught and fault.kind not in SEEDS:
            return
        for at in places:
            assert trial.machine.patch(kernel, at, fault.opcode, fault.shift)
        found = trial.search(fault.kind, cases)
        trial.machine.restore()
        caught += found is not None
        yield Outcome(name, fault.kind, found, listing[places[0]])


def sampled(listing: list[Instruction]) -> dict[str, list[tuple[list[int], Fault]]]:
    """Return the faults of each kind in a program, in random order, with the instructions that have them."""
    by_kind = defaultdict(list)
    rounded = defaultdict(list)  # a source that cuts does so in each of its entries
    for at, instruction in enumerate(listing):
        if instruction.runs:
            for fault in possible(instruction.text):
                if fault.kind == "rounding":
                    rounded[fault].append(at)
                else:
                    by_kind[fault.kind].append(([at], fault))
    for faults in by_kind.values():
        random.Random(0).shuffle(faults)
    return {**by_kind, "rounding": [(places, fault) for fault, places in rounded.items()]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--each", type=int, default=6, help="faults of a kind in each program")
    each = parser.parse_args().each
    machine = plugin.start()
    machine.set_options(limit=2e6)  # a loop whose end a fault has moved
    outcomes = list(run(machine, each))
    names = demangled({outcome.kernel for outcome in outcomes})
    counts: dict[str, Counter] = defaultdict(Counter)
    for outcome in outcomes:
        counts[names[outcome.kernel]][outcome.kind, outcome.found is not None] += 1
    print("| kernel |", " | ".join(KINDS), "|")
    print("|---" * (len(KINDS) + 1), "|", sep="")
    for kernel, of in counts.items():
        totals = [(of[kind, True], of[kind, True] + of[kind, False]) for kind in KINDS]
        cells = (f"{caught}/{total}" if total else "" for caught, total in totals)
        print(f"| `{kernel}` |", " | ".join(cells), "|")
    for outcome in outcomes:
        if outcome.found is None:
            place = f"{outcome.instruction.source} {outcome.instruction.text}"
            print(f"survived: {names[outcome.kernel]}: {outcome.kind}: {place}")
    unseen = [
        f"{kernel}: {kind}"
        for kernel, of in counts.items()
        for kind in KINDS
        if of[kind, False] and not of[kind, True] and kind not in EQUIVALENT.get(kernel, ())
    ]
    sys.exit(f"faults that nothing finds: {', '.join(unseen)}" if unseen else 0)


if __name__ == "__main__":
    main()
