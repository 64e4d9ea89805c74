"""A plugin of pytest: the backends `triton` and `cuda` run on the PTX machine in this process.

The environment says how (README.md): PTX_DEVICE, PTX_OPTIONS, PTX_COVERAGE.
"""

import os
from pathlib import Path

import pytest

from . import build, coverage, package, triton_driver
from .library import Machine

# Few, so that kernels which fill the device stay small.
MULTIPROCESSORS = 4


def start() -> Machine:
    """Put engram_kernels on the machine."""
    machine = Machine(build.machine())
    machine.set_device(os.environ.get("PTX_DEVICE", "A100"), MULTIPROCESSORS)
    for option in os.environ.get("PTX_OPTIONS", "").split():
        name, value = option.split("=")
        machine.set_options(**{name: float(value)})
    os.environ["TRITON_CACHE_DIR"] = str(build.FOLDER / "triton")
    triton_driver.install(machine)
    package.install(machine, build.extension(machine.attribute("architecture")))
    return machine


class _Plugin:
    def __init__(self, machine: Machine):
        self.machine = machine

    def pytest_unconfigure(self):
        if path := os.environ.get("PTX_COVERAGE"):
            coverage.write(self.machine, Path(path))


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config):
    """Before conftest.py imports engram_kernels, which then looks for a GPU."""
    early_config.pluginmanager.register(_Plugin(start()))
