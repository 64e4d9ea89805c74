"""Digests of tensors."""

import hashlib

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def tensor_checksum(tensor: Tensor) -> str:
    """A digest of a tensor's dtype, shape and bits."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
