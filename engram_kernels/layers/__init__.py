"""Layers of sequence models whose state is an associative memory, learnt at test time token by token."""

from .mixture import MixtureOfMemories
from .ridge_memory import MemoryState, RidgeMemory

__all__ = ["MemoryState", "MixtureOfMemories", "RidgeMemory"]
