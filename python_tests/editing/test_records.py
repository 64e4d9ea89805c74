"""Writes without one of their edits, and writes joined, against the write that was made so."""

import pytest
import torch

pytest.importorskip("transformers")

from editing_helpers import changed, small_editor, weights

import engram_kernels as ek
from engram_kernels.editing import Edit, EditResult
from engram_kernels.editing.writing.records import Write, joint_write
from engram_kernels.errors import EngramError

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("shares", [(3, 2), (12, 3), (20, 30)])
@pytest.mark.parametrize("ridge", [0.0, 0.4])
def test_writes_of_shares_join_to_the_write_of_all(shares, ridge):
    """Few keys and many, also where a share has few and all together many."""
    width, rows, count = 24, 10, sum(shares)
    if ridge == 0 and count > width:
        pytest.skip("more keys than dimensions need a ridge")
    weight, keys, values = torch.randn(rows, width), torch.randn(count, width), torch.randn(count, rows)
    inverse = torch.eye(width, dtype=torch.float64) + 0.1
    residuals = values - keys @ weight.T
    writes, edits = [], iter(range(count))
    for own, wanted, change in zip(*(part.split(shares) for part in (keys, values, residuals)), strict=True):
        left, right = ek.low_rank_factors(weight, own, wanted, inverse_covariance=inverse, ridge=ridge)
        change = left.T if ridge > 0 and 2 * len(own) >= width else change
        writes.append(Write("a", left, right, own, change, ridge, tuple(next(edits) for _ in own)))
    joint = joint_write(writes)
    assert joint.edits == tuple(range(count)) and torch.equal(joint.keys, keys)
    left, right = ek.low_rank_factors(weight, keys, values, inverse_covariance=inverse, ridge=ridge)
    truth, got = left @ right, joint.left @ joint.right
    added = sum(write.left @ write.right for write in writes)
    assert float((got - truth).norm() / truth.norm()) < 1e-5
    assert float((added - truth).norm() / truth.norm()) > 0.05


def shares_of(editor, method="emmet", layers=1, **options):
    """Three edits by themselves, each found in the unedited model."""
    results = []
    for subject, target in (("The Eiffel Tower", "Rome"), ("Zürich", "Paris"), ("Colosseum", "Tokyo")):
        edit = Edit(subject, "{} is located in the city of", target)
        results.append(editor.edit(edit, layers=layers, method=method, **options))
        results[-1].revert()
    return results


def test_results_of_three_jobs_join_to_the_result_of_one(cache):
    editor = small_editor(cache_dir=cache)
    shares = shares_of(editor)
    joined = EditResult.join(shares)
    assert [record.edit.target for record in joined.records] == ["Rome", "Paris", "Tokyo"]
    assert not joined.applied and len(joined.writes) == 1
    whole = editor.edit([share.records[0].edit for share in shares], layers=1, method="emmet")
    expected = whole.factors(whole.modules[0])
    whole.revert()
    update, truth = (left @ right for left, right in (joined.factors(joined.modules[0]), expected))
    assert float((update - truth).norm() / truth.norm()) < 1e-4
    before = weights(editor.model)
    with joined.apply(editor.model):
        assert changed(before, editor.model) == ["model.layers.1.mlp.down_proj.weight"]
    assert changed(before, editor.model) == []


def test_results_that_do_not_join(cache):
    editor = small_editor(cache_dir=cache)
    shares = shares_of(editor)
    with pytest.raises(EngramError, match=r"^results: expected independent keys"):
        EditResult.join([shares[0], shares[0]])
    (other,) = shares_of(editor, layers=2)[:1]
    with pytest.raises(EngramError, match=r"^results: expected edits of the same matrices.* number 1$"):
        EditResult.join([shares[0], other])
    (ridged,) = shares_of(editor, ridge=0.1)[:1]
    with pytest.raises(EngramError, match=r"^results: expected one ridge, got "):
        EditResult.join([shares[0], ridged])
    facts = [share.records[0].edit for share in shares]
    with editor.edit(facts, layers=1, method="rome") as several:
        pass
    with pytest.raises(EngramError, match=r"^results: expected one write a matrix, got 3 of 1 in number 1"):
        EditResult.join([shares[0], several])
    with pytest.raises(ValueError, match=r"^results: expected at least one"):
        EditResult.join([])
