"""Where a memory keeps what: the two ways to address it, and the fixed matrix M₀."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check

# "key": w = z M₀⁺, as for writing; "content": w = z M⁺, a projection onto what the memory holds.
ADDRESSINGS = ("key", "content")


def check_addressing(addressing: str) -> None:
    """Check that a word is one of the ways to address a memory."""
    check.expect(addressing in ADDRESSINGS, "addressing", "'key' or 'content'", repr(addressing))


def addressing_matrix(m0: str | Tensor, slots: int, latent: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return M₀ [slots, latent] and M₀⁺ [latent, slots] in fp64.

    Args:
        m0: "random": orthonormal rows, or columns where there are more slots than latent entries, so that a
            weight is no longer than its latent; "identity": the first entries of a latent are its weights; or
            a tensor of full rank.
        slots: K.
        latent: C.
        seed: of a random matrix; the global random state stays as it is.

    Raises:
        ValueError: another word, or a tensor of another shape, of lower rank, or that is not finite.
        TypeError: wrong dtype.

    Example:
        >>> m0, m0_pinv = addressing_matrix("random", slots=384, latent=384, seed=0)
    """
    if isinstance(m0, Tensor):
        check.floating("m0", m0)
        check.shape("m0", m0, (slots, latent), "[slots, latent]")
        check.finite("m0", m0)
        prior = m0.detach().double().clone()
        rank, full = int(torch.linalg.matrix_rank(prior)), min(slots, latent)
        check.expect(rank == full, "m0", f"a matrix of rank {full}", f"rank {rank}")
        return prior, torch.linalg.pinv(prior)
    check.expect(m0 in ("random", "identity"), "m0", "'random', 'identity' or a tensor", repr(m0))
    # Named, so that a default device of the caller's does not meet a generator of another.
    plain = {"dtype": torch.float64, "device": "cpu"}
    if m0 == "identity":
        prior = torch.eye(slots, latent, **plain)
    else:
        generator = torch.Generator("cpu").manual_seed(seed)
        tall = torch.randn(max(slots, latent), min(slots, latent), generator=generator, **plain)
        orthonormal = torch.linalg.qr(tall).Q
        prior = orthonormal if slots >= latent else orthonormal.mT.contiguous()
    # Of orthonormal rows or columns the transpose is the pseudo-inverse.
    return prior, prior.mT.contiguous()
