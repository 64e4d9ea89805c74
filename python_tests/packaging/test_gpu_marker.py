"""On a machine with a GPU, only the tests that are marked for it see it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]

# As if torch saw a GPU, and nothing had kernels for it.
PLUGIN = """
import sys
import torch
sys.modules["triton"] = sys.modules["engram_kernels._cuda"] = None
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda device=None: (9, 0)
"""
TESTS = """
import os
import pytest
import torch

SEEN = torch.cuda.is_available()

@pytest.mark.gpu
def test_marked():
    assert SEEN and torch.cuda.is_available() and torch.cuda.device_count() == 1
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"

@pytest.fixture(scope="module")
def seen_by_a_fixture():
    return torch.cuda.is_available()

def test_not_marked(seen_by_a_fixture):
    assert not seen_by_a_fixture
    assert SEEN and not torch.cuda.is_available() and torch.cuda.device_count() == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""

def test_on_the_reference(device):
    assert torch.cuda.is_available() == (device.type == "cuda")
"""


def test_only_marked_tests_see_the_gpu(tmp_path):
    shutil.copy(HERE / "conftest.py", tmp_path)
    (tmp_path / "a_gpu.py").write_text(PLUGIN)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "CUDA_VISIBLE_DEVICES": "0",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "a_gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "skipped" not in done.stdout
