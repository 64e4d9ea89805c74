"""Which instructions of which kernels were run: each process that runs kernels writes a file of it."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .library import Instruction, Machine, Statistics


class Kernel(NamedTuple):
    architecture: int
    name: str
    instructions: list[Instruction]

    def key(self) -> tuple[int, str, str]:
        """What kernels of several processes are told apart by: a name has many specialisations."""
        text = "\n".join(instruction.text for instruction in self.instructions)
        return self.architecture, self.name, hashlib.sha256(text.encode()).hexdigest()


def opcode(text: str) -> str:
    return re.sub(r"^@!?\S+\s+", "", text).split()[0].rstrip(";")


def write(machine: Machine, path: Path) -> None:
    architecture = machine.attribute("architecture")
    kernels = [(architecture, name, machine.listing(number)) for number, name in enumerate(machine.kernels())]
    path.write_text(json.dumps({"statistics": machine.counts(), "kernels": kernels}))


def read(paths: Iterable[Path]) -> tuple[list[Statistics], list[Kernel]]:
    """Return what was counted in each process, and the kernels of all, with the runs of all."""
    statistics, kernels = [], {}
    for path in paths:
        data = json.loads(path.read_text())
        statistics.append(Statistics(*data["statistics"]))
        for architecture, name, lines in data["kernels"]:
            kernel = Kernel(architecture, name, [Instruction(*line) for line in lines])
            if known := kernels.get(kernel.key()):
                pairs = zip(known.instructions, kernel.instructions, strict=True)
                kernel.instructions[:] = [b._replace(runs=a.runs + b.runs) for a, b in pairs]
            kernels[kernel.key()] = kernel
    return statistics, list(kernels.values())
