"""A memory's file taken apart, and put together again with the checksum that belongs to it."""

import json

import torch
from safetensors.torch import load, save

from engram_kernels.memory import files


def unpack(path):
    """The settings, the tensors and the ledger of a memory's file."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    tensors = load(content)
    lines = json.loads(bytes(tensors.pop("ledger").numpy()))
    return json.loads(header["__metadata__"]["memory"]), tensors, lines


def pack(path, config, tensors, lines):
    """Write a file as if it had been saved like that."""
    text = lines if isinstance(lines, str) else json.dumps(lines)
    tensors = {**tensors, "ledger": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}
    config = {name: value for name, value in config.items() if name != "checksum"}
    config["checksum"] = files._checksum(config, tensors)
    path.write_bytes(save(tensors, {"memory": json.dumps(config)}))
