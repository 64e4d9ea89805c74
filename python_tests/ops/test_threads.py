"""The threads of the C++ kernels: torch's; in forks, and where several threads of a process call at once."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import engram_kernels as ek

if reason := ek.backends()["cpu"]:
    pytest.skip(reason, allow_module_level=True)


def arguments(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((512, 1024), (512, 16), (16, 1024))
    weight, left, right = (torch.randn(shape, generator=generator) for shape in shapes)
    return weight.bfloat16(), left, right


def update(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    with ek.use_backend("cpu"):
        return ek.apply_low_rank_(weight.clone(), left, right)


def bits(weight: torch.Tensor) -> bytes:
    return weight.view(torch.int16).numpy().tobytes()


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_callers_side_by_side_get_what_each_gets_alone():
    given = [arguments(seed) for seed in range(8)]
    alone = [update(*one) for one in given]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            together = pool.map(lambda one: update(*one), given)
            assert all(map(torch.equal, together, alone))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads as Linux lists them")
def test_kernels_run_on_the_threads_that_torch_has():
    given = arguments(0)
    torch.set_num_threads(7)  # more than other tests have begun
    torch.ones(1 << 22).add_(1)  # long enough for all of them
    before = os.listdir("/proc/self/task")
    update(*given)
    assert os.listdir("/proc/self/task") == before


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_fork_does_not_wait_for_the_threads_of_its_parent():
    weight, left, right = arguments(0)
    expected = update(weight, left, right)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # ends a child that waits for its parent's threads
        # Small enough for torch to use none of its own, which do not survive a fork.
        with ek.use_backend("cpu"):
            ek.apply_low_rank_(weight, left, right)
        os._exit(0 if bits(weight) == bits(expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


FORKED_FIRST = """
import os, signal, torch, engram_kernels as ek
torch.set_num_threads(4)
torch.ones(1 << 22).add_(1)  # begins torch's threads
weight, left, right = torch.ones(512, 1024), torch.ones(512, 2), torch.ones(2, 1024)
child = os.fork()
if child == 0:
    signal.alarm(30)
    with ek.use_backend("cpu"):
        ek.apply_low_rank_(weight, left, right)
    os._exit(0 if weight[0, 0] == weight[-1, -1] == 3 else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_whose_parent_called_no_kernel_does_not_wait_either():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED_FIRST], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
