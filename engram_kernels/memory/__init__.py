"""Episodic memory: write, read and forget latents in one least-squares step.

Das et al. 2024 (arXiv 2403.11901); the memory: Pham et al. 2022.
"""

from .encoder import SentenceEncoder, load_encoder
from .episodic import EpisodicMemory
from .recall import Recalled

__all__ = ["EpisodicMemory", "Recalled", "SentenceEncoder", "load_encoder"]
