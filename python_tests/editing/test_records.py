"""Writes without one of their edits, against the write that never had it."""

import pytest
import torch

import engram_kernels as ek
from engram_kernels.editing.records import Write


@pytest.mark.parametrize(("count", "ridge"), [(5, 0.0), (5, 0.4), (12, 0.4), (24, 0.4), (40, 0.4)])
def test_a_write_without_edits_is_that_of_the_others(count, ridge):
    """Few keys and many: the factors of the latter are Eᵀ and S P."""
    width, rows = 24, 10
    weight, keys, values = torch.randn(rows, width), torch.randn(count, width), torch.randn(count, rows)
    inverse = torch.eye(width, dtype=torch.float64) + 0.1
    left, right = ek.low_rank_factors(weight, keys, values, inverse_covariance=inverse, ridge=ridge)
    many = ridge > 0 and 2 * count >= width
    residuals = left.T if many else values - keys @ weight.T
    write = Write("a", left, right, keys, residuals, ridge, tuple(range(count)))
    for gone in ([2], [2, 2], [2, 2, 0]):  # the later ones are renumbered
        rest = write
        for number in gone:
            rest = rest.without(number)
    kept = [place for place in range(count) if place not in (0, 2, 3)]
    assert rest.edits == tuple(range(count - 3)) and torch.equal(rest.keys, keys[kept])
    truth = ek.low_rank_factors(weight, keys[kept], values[kept], inverse_covariance=inverse, ridge=ridge)
    got, truth = rest.left @ rest.right, truth[0] @ truth[1]
    assert float((got - truth).norm() / truth.norm()) < 1e-5
