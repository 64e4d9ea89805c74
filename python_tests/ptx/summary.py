"""What `make ptx` ran: `python -m ptx.summary FILES` of coverage; fails if what was left out has no reason."""

import re
import subprocess

from .library import Instruction

# Why no test reaches an instruction, by a pattern of its kernel, of its source line and of its text.
UNREACHABLE: list[tuple[str, str, str, str]] = []


def demangled(names: list[str]) -> dict[str, str]:
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    plain = [re.sub(r"engram::cuda::|\(anonymous namespace\)::|^void |\(.*", "", n) for n in text.stdout.splitlines()]
    return dict(zip(names, plain, strict=True))


def reason(kernel: str, instruction: Instruction) -> str | None:
    for name, source, text, why in UNREACHABLE:
        if re.search(name, kernel) and re.search(source, instruction.source) and re.search(text, instruction.text):
            return why
    return None
