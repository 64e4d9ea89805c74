"""What the tests share: the backends that exist here, seeds, poisoned outputs, the command line."""

import os
from contextlib import contextmanager

import pytest
import torch

import engram_kernels as ek
from engram_kernels.backends import NAMES, unavailable

# Of the command line's tables: it looks once, when the first test imports it.
os.environ["COLUMNS"] = "200"

CASES = [
    pytest.param((backend, device), marks=[pytest.mark.gpu] * (device == "cuda"))
    for backend in NAMES
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available()
    # On CPU tensors triton and cuda run in processes of their own alone: see ptx/.
    if unavailable(backend, device) is None
]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Hide the GPU from tests without the marker: what chooses a device by itself takes the CPU in them."""
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("gpu") is None:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(torch.cuda, "device_count", lambda: 0)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for child processes: this one has looked already
        return (yield)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def device(request):
    """Force each backend that can run here, and give the device that it serves."""
    backend, device = request.param
    with ek.use_backend(backend):
        yield torch.device(device)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Fill every `torch.empty` with NaN, so that an element that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for what the tests of one file compute once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def one_thread():
    """Models this small lose more by waiting for a second thread than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def room_for():
    """`with room_for(bytes):` no file of this process can become larger, as on a disk that is full."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def limited(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def engram(monkeypatch, capsys):
    """Run the command line; return its exit status and what it printed."""
    from engram_kernels import cli

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["engram", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return run
