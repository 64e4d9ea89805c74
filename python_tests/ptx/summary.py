"""What was run of what there is: `python -m ptx.summary FILES` reads what processes have covered.

Fails if an instruction was not reached, and UNREACHED does not say why.
"""

import functools
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

from . import coverage
from .build import ROOT
from .coverage import Kernel, opcode
from .library import Instruction, Statistics

# Patterns of a kernel, of the line of its source and of an instruction, and why no test reaches it.
UNREACHED = [
    (
        "",
        r" / | % |ceil_divide",
        r"(div|rem)\.s64|bra|mul\.lo\.s64|sub\.s64",
        "numbers beyond 32 bits are divided",
    ),
    (
        "residual_gram",
        r"values \? |i % tile_rows|first_row \+ row >=|i < tile_rows|thread = threadIdx|^}",
        "",
        "a Gram matrix would be taken from values: there are none",
    ),
    (
        "_residual_kernel|_apply_low_rank_kernel",
        r"= tl\.load\((values|tile)",
        "",
        "a loop of no rounds: without columns or factors there is no launch",
    ),
    (
        "memory_stream",
        r"plan\.state|in_lower|/ padding|^}",
        "",
        "40 multiprocessors keep the state in shared memory, and 4 do not",
    ),
    (
        "CountKeys|WriteMasks|copy_kernel|memory_stream|small_solve|residual_gram",
        r"for \(int \w+ = |while \(entry|failed \? NAN",
        "",
        "what unrolling leaves of a loop, of which the counts are multiples, or fewer",
    ),
]
_SOURCES = [*(ROOT / "csrc" / "cuda").iterdir(), *(ROOT / "engram_kernels" / "backends" / "triton").iterdir()]


@functools.cache
def line_of(place: str) -> str:
    """Return the line of the source that an instruction comes from."""
    name, _, number = place.partition(":")
    for path in _SOURCES:
        if path.name == name and number:
            return path.read_text(encoding="utf-8").splitlines()[int(number) - 1].strip()
    return ""


def reason(kernel: str, instruction: Instruction) -> str | None:
    """Return why no test reaches an instruction, or None if nobody has said so."""
    for kernels, lines, instructions, why in UNREACHED:
        if (
            re.search(kernels, kernel)
            and re.search(lines, line_of(instruction.source))
            and re.search(instructions, instruction.text)
        ):
            return why
    return None


def demangled(names: set[str]) -> dict[str, str]:
    """Return the names as they stand in the sources."""
    listed = sorted(names)
    done = subprocess.run(["c++filt"], input="\n".join(listed), capture_output=True, text=True, check=True)
    plain = []
    for line in done.stdout.splitlines():
        line = re.sub(r"^void |engram::cuda::|\(anonymous namespace\)::|\(.*", "", line)
        line = re.sub(r"RowDots<(\w+), .*", r"\1>", line)
        plain.append(re.sub(r"^program_kernel<(.*?) ?>$", r"\1", line))
    return dict(zip(listed, plain, strict=True))


def share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({100 * part / max(1, whole):.1f} %)"


def missed(programs: list[Kernel], names: dict[str, str]) -> dict[str | None, Counter]:
    """Return what was not reached: of each reason the places, with the number of their instructions."""
    ran = defaultdict(set)
    for kernel in programs:
        ran[kernel.name].update((i.source, opcode(i.text)) for i in kernel.instructions if i.runs)
    places: dict[str | None, Counter] = defaultdict(Counter)
    for kernel in programs:
        for i in kernel.instructions:
            if i.runs:
                continue
            elsewhere = (i.source, opcode(i.text)) in ran[kernel.name]
            why = reason(names[kernel.name], i)
            why = why or ("a copy, unrolled or specialised, of what was run" if elsewhere else None)
            places[why][f"{names[kernel.name]}, {i.source}: {line_of(i.source) or i.text}"] += 1
    return places


def summary(statistics: list[Statistics], kernels: list[Kernel]) -> tuple[list[str], int]:
    """Return lines to print, and the number of instructions that were not reached and have no reason."""
    names = demangled({kernel.name for kernel in kernels})
    lines, unexplained = [], 0
    for architecture in sorted({kernel.architecture for kernel in kernels}):
        programs = [kernel for kernel in kernels if kernel.architecture == architecture]
        code = [i for kernel in programs for i in kernel.instructions]
        run = [i for i in code if i.runs]
        known, reached = ({opcode(i.text) for i in some} for some in (code, run))
        lines += [
            f"sm_{architecture}: {len({names[k.name] for k in programs})} kernels, {len(programs)} programs",
            f"  instructions run  {share(len(run), len(code))}",
            f"  opcodes run       {share(len(reached), len(known))}"
            + "".join(f", not {name}" for name in sorted(known - reached)),
        ]
        places = missed(programs, names)
        for why in sorted(places, key=lambda why: -places[why].total()):
            lines.append(f"  not reached {places[why].total():>6,}  {why or 'and nothing says why:'}")
        lines += [f"    {count:>6,}  {place}" for place, count in places[None].most_common(30)]
        unexplained += places[None].total()
    launches, warps, lanes, repeated, conflicts = (sum(column) for column in zip(*statistics, strict=True))
    lines += [
        f"{launches:,} launches, {warps:,} instructions of warps, {lanes:,} of threads",
        # A race is a fault, and a fault fails its test.
        f"races: none in a test that passed; words that several threads stored: {repeated:,} the same value, "
        f"{conflicts:,} different ones",
    ]
    return lines, unexplained


def main() -> None:
    lines, unexplained = summary(*coverage.read(map(Path, sys.argv[1:])))
    print(*lines, sep="\n")
    sys.exit(f"{unexplained:,} instructions are not reached, and nothing says why" if unexplained else 0)


if __name__ == "__main__":
    main()
