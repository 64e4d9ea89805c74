"""What compilers say that kernels use: registers, shared memory, spills; read from what two tests print."""

import ast
import re

_TRITON = re.compile(r"^(?P<kernel>\S.*), sm_(?P<architecture>\d+): (?P<used>\{.*\})$")
_SOURCE = re.compile(r"^(?P<source>\S+\.cu), sm_(?P<architecture>\d+): registers")
_CUDA = re.compile(
    r"^ *(?P<registers>\d+) +(?P<shared>\d+) +(?P<stack>\d+) +(?P<spilled>\d+)  (?P<kernel>\S.*)$"
)


def read(log: str) -> list[dict]:
    """Read the output of test_triton_aot.py and test_cuda_build.py: one entry a kernel and architecture."""
    found, source, architecture = [], None, None
    for line in log.splitlines():
        if match := _TRITON.match(line):
            used = ast.literal_eval(match["used"])
            found.append(
                {
                    "kernel": match["kernel"],
                    "architecture": int(match["architecture"]),
                    "registers": used["REG"],
                    "shared": used["SHARED"],
                    "spilled": used["STACK"] + used["LOCAL"] if used["SPILLS"] else 0,
                }
            )
        elif match := _SOURCE.match(line):
            source, architecture = match["source"], int(match["architecture"])
        elif source and (match := _CUDA.match(line)):
            found.append(
                {
                    "kernel": f"{source}: {match['kernel']}",
                    "architecture": architecture,
                    "registers": int(match["registers"]),
                    "shared": int(match["shared"]),
                    "spilled": int(match["stack"]) + int(match["spilled"]),
                }
            )
    return found


def table(found: list[dict]) -> list[str]:
    """One line a kernel, a column an architecture: registers / bytes of shared memory / bytes spilled."""
    architectures = sorted({use["architecture"] for use in found})
    cells: dict[str, dict[int, str]] = {}
    for use in found:
        text = f"{use['registers']} / {use['shared']} / {use['spilled']}"
        cells.setdefault(use["kernel"], {})[use["architecture"]] = text
    lines = [
        "| kernel: registers / shared / spilled | " + " | ".join(f"sm_{a}" for a in architectures) + " |"
    ]
    lines.append("| --- |" + " ---: |" * len(architectures))
    for kernel, uses in cells.items():
        lines.append(f"| {kernel} | " + " | ".join(uses.get(a, "") for a in architectures) + " |")
    return lines
