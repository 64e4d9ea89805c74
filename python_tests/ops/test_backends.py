"""The choice of a backend."""

import importlib
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch

import engram_kernels as ek
from engram_kernels.backends import _environment, explain, forced


def test_every_backend_is_listed_with_a_reason():
    listed = ek.backends()
    assert list(listed) == ["torch", "cpu", "triton", "cuda"]
    assert listed["torch"] is None
    for reason in listed.values():
        assert reason is None or (isinstance(reason, str) and reason)


def test_use_backend_nests_and_ends_on_errors():
    assert forced() is None
    with pytest.raises(RuntimeError, match="inside"):
        with ek.use_backend("torch"):
            assert forced() == "torch"
            raise RuntimeError("inside")
    assert forced() is None


@pytest.mark.skipif(ek.backends()["cpu"] is not None, reason="the CPU kernels are not built")
def test_a_block_takes_only_its_own_backend_away():
    first = ek.use_backend("torch")
    first.__enter__()
    with ek.use_backend("cpu"):
        first.__exit__(None, None, None)
        assert forced() == "cpu"
    assert forced() is None


def test_unknown_backend():
    with pytest.raises(ValueError, match="name: expected one of torch, cpu, triton, cuda, got 'mps'"):
        with ek.use_backend("mps"):
            pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_backend_that_cannot_run_says_why():
    with pytest.raises(ek.EngramError, match=r"'cuda'.*CUDA|'cuda'.*not built"):
        with ek.use_backend("cuda"):
            pass


def test_the_native_kernel_serves_what_it_takes_and_the_reference_the_rest():
    if ek.backends()["cpu"] is not None:
        pytest.skip(f"no C++ kernels here: {ek.backends()['cpu']}")
    weight = torch.zeros(1, 4, 6)
    narrow = (weight, torch.zeros(1, 4, 2), torch.zeros(1, 2, 6), 1.0)
    wide = (weight, torch.zeros(1, 4, 1000), torch.zeros(1, 1000, 6), 1.0)
    assert explain("apply_low_rank_", "cpu", narrow)[0] == ("cpu", None)
    (first, reason), second = explain("apply_low_rank_", "cpu", wide)
    assert first == "cpu" and "rank 1000" in reason and second == ("torch", None)


@pytest.mark.parametrize(("value", "expected"), [("torch", "torch"), ("", None)])
def test_environment_variable(monkeypatch, value, expected):
    """As a new process reads it, but without waiting for one to import torch."""
    monkeypatch.setenv("ENGRAM_BACKEND", value)
    _environment.cache_clear()
    try:
        assert forced() == expected
        first = next(name for name, reason in explain("apply_low_rank_", "cpu") if reason is None)
        assert first == "torch" if expected else first in ("cpu", "torch")
        got = ek.apply_low_rank_(torch.ones(2, 2), torch.ones(2, 1), torch.ones(1, 2))
        assert torch.equal(got, torch.full((2, 2), 2.0))
    finally:
        _environment.cache_clear()


def test_an_environment_variable_that_names_no_backend():
    environment = {**os.environ, "ENGRAM_BACKEND": "gpu"}
    program = (
        "import torch, engram_kernels as ek; "
        "ek.apply_low_rank_(torch.ones(2, 2), torch.ones(2, 1), torch.ones(1, 2))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "ENGRAM_BACKEND: expected one of torch, cpu, triton, cuda, got 'gpu'" in done.stderr


def test_backends_is_a_module_that_answers_when_it_is_called():
    assert ek.backends is importlib.import_module("engram_kernels.backends")
    assert isinstance(ek.backends, ModuleType) and ek.backends.explain is explain
    assert ek.backends()["torch"] is None
