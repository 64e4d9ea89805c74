"""A pytest plugin that collects what a machine with a GPU would: for `--collect-only`, on any machine.

PYTHONPATH=bench python -m pytest -p as_if_gpu --collect-only -m gpu python_tests
"""

import pytest
import torch

from engram_kernels import backends


def pytest_configure(config):
    if not config.option.collectonly:
        raise pytest.UsageError("as_if_gpu: expected --collect-only, for there is no GPU to run on")


# Before any conftest.py asks.
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device=None: (9, 0)
backends.unavailable = lambda backend, device=None: None
