"""Python on the PTX machine, in a process of its own: the machine takes the place of a GPU in all of it."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import build

TESTS = Path(__file__).parents[1]


def missing() -> str | None:
    """Return why the kernels cannot run on the machine here, in a sentence, or None."""
    if torch.cuda.is_available():
        return "on a GPU the kernels are tested there"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed"
    if tuple(map(int, version.split(".")[:2])) < (3, 7):
        return f"Triton {version} shuffles registers that some lanes have not set, which the machine forbids"
    return build.missing()


def run(*arguments, **environment: str) -> str:
    """Run Python on these arguments; return what it printed, or fail with it."""
    path = os.pathsep.join([str(TESTS), str(TESTS / "helpers"), *sys.path])
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
    )
    if done.returncode:
        pytest.fail(done.stdout[-8000:] + done.stderr[-2000:], pytrace=False)
    return done.stdout
