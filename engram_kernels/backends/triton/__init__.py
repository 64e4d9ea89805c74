"""Triton kernels: no compiler at install; CPU tensors only under TRITON_INTERPRET=1."""

import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)


def unavailable() -> str | None:
    """Say why the Triton kernels cannot run, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


# Triton takes long to import: only where its kernels can run.
if unavailable() is None:
    from . import rank_one  # noqa: F401
