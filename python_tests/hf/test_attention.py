"""Attention as a CPU does it fastest: what is set within, and that nothing stays."""

import os

import pytest

pytest.importorskip("transformers")

import model_zoo
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engram_kernels.editing import Edit, ValueOptions
from engram_kernels.editing.search.batching import encode_edit
from engram_kernels.editing.search.values import find_values
from engram_kernels.hf.attention import fast_attention
from engram_kernels.hf.projection import output_projection

CPU, NAME = torch.device("cpu"), "TRANSFORMERS_SDPA_FORCE_GQA"


def test_threads_that_overlap_leave_everything_as_it_was(monkeypatch):
    monkeypatch.delenv(NAME, raising=False)
    first, second = (fast_attention(CPU, torch.bfloat16) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert os.environ[NAME] == "1"
    assert not torch.backends.cuda.flash_sdp_enabled()
    second.__exit__(None, None, None)
    assert NAME not in os.environ
    assert torch.backends.cuda.flash_sdp_enabled()


def test_the_variable_is_the_users_where_it_is_set(monkeypatch):
    monkeypatch.setenv(NAME, "0")
    with fast_attention(CPU, torch.float32):
        assert os.environ[NAME] == "0"
    assert os.environ[NAME] == "0"


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_fused_kernels_stay_where_they_are_fast(device, dtype):
    with fast_attention(torch.device(device), dtype):
        assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_search_in_bfloat16_runs_no_fused_attention(dtype):
    """Whose backward pass takes ten times as long as plain products of the same bits."""
    model, tokenizer = model_zoo.small_model("llama").to(dtype), model_zoo.byte_level_tokenizer()
    text = encode_edit(model, tokenizer, Edit("Rome", "{} is in", "Paris"), ["maps"])
    seen = set()

    class See(TorchDispatchMode):
        def __torch_dispatch__(self, function, _types, arguments=(), keywords=None):
            seen.add(str(function))
            return function(*arguments, **(keywords or {}))

    with See():
        (value,) = find_values(model, output_projection(model, 1), [text], ValueOptions(steps=3, widen=False))
    assert value.change.isfinite().all()
    fused = any("flash_attention" in name for name in seen)
    assert fused == (dtype is torch.float32)
