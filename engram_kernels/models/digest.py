"""Digests of tensors and of settings."""

import hashlib
import json

import torch
from torch import Tensor, nn


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def tensor_checksum(tensor: Tensor) -> str:
    """A digest of a tensor's dtype, shape and bits."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def weights_checksums(model: nn.Module) -> dict[str, str]:
    """The checksum of every tensor of a model, by name."""
    return {name: tensor_checksum(tensor) for name, tensor in sorted(model.state_dict().items())}


def digest(*contents: object) -> str:
    """A digest of anything that JSON holds."""
    return hashlib.sha256(json.dumps(contents, ensure_ascii=False).encode()).hexdigest()
