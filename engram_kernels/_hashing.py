"""Digests of tensors and of settings."""

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def tensor_checksum(tensor: Tensor) -> str:
    """A digest of a tensor's dtype, shape and bits."""
    return checksum_of(tensor.dtype, tensor.shape, [tensor_bytes(tensor)])


def checksum_of(dtype: torch.dtype, shape: Iterable[int], pieces: Iterable[bytes | memoryview]) -> str:
    """The same of a tensor whose bytes come in pieces, in row-major order."""
    digest = hashlib.sha256(f"{dtype} {tuple(shape)}".encode())
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def plain_tensors(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The plain tensors that a tensor is made of, by name: itself, or the parts of a quantised one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [(name, tensor)]
    parts, _ = tensor.__tensor_flatten__()
    return [inner for part in parts for inner in plain_tensors(f"{name}.{part}", getattr(tensor, part))]


def digest(*contents: object) -> str:
    """A digest of anything that can be written as JSON."""
    return hashlib.sha256(json.dumps(contents, ensure_ascii=False).encode()).hexdigest()
