"""Measure every benchmark that a CPU has time for, and keep the results in bench/results/CPU-COMMIT.json.

    python bench/cpu.py [pytest's arguments]        make bench

A case that is there already, of the same commit, is measured anew.
"""

import sys
from pathlib import Path

import machine
import pytest
import results
from report import RESULTS

BENCH = Path(__file__).parent


def main(*arguments: str) -> int:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / results.name_of(machine.processor(), machine.commit())
    if not path.exists():
        results.begin(path, "make bench")
    machine.main("describe", path)
    machine.main("rates", path, "cpu")
    options = ["-p", "no:cacheprovider", "--benchmark-only", "-k", "not cuda", "--results", str(path)]
    return pytest.main([*options, *(arguments or [str(BENCH)])])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
