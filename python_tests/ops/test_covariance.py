"""The covariance: solves, inverse, condition, files, and what it refuses."""

import os

import child
import pytest
import torch
from accuracy import error
from matrices import covariance_of
from mutations import flip

import engram_kernels as ek
from engram_kernels._io import save_sealed_tensors


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e8])
def test_solve_and_inverse(condition):
    covariance = covariance_of(65, condition)
    given = ek.Covariance.from_second_moment(covariance * 500, 500)
    keys = torch.randn(9, 65, dtype=torch.float64)
    exact = torch.linalg.solve(covariance, keys.T).T
    assert error(given.solve(keys), exact) < 1e-14 * max(condition, 10)
    assert error(given.inverse() @ covariance, torch.eye(65)) < 1e-14 * max(condition, 10)
    assert given.solve(keys.bfloat16()).dtype == torch.bfloat16
    assert condition * 0.8 <= given.condition <= condition * 1.001
    assert given.dim == 65 and given.count == 500


def test_ridge_is_relative_to_the_mean_of_the_diagonal():
    moment = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    given = ek.Covariance.from_second_moment(moment, 10, ridge=0.5)
    assert error(given.inverse(), torch.diag(1 / torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64))) < 1e-7


def test_singular_moment_says_what_would_do():
    inputs = torch.randn(20, 50)
    moment = ek.second_moment_(torch.zeros(50, 50, dtype=torch.float64), inputs)
    with pytest.raises(
        ek.EngramError, match=r"20 samples for 50 dimensions.*ridge of 1e-06 or more"
    ) as caught:
        ek.Covariance.from_second_moment(moment, 20)
    assert "\n" not in str(caught.value)
    ek.Covariance.from_second_moment(moment, 20, ridge=1e-6)


def test_a_moment_summed_in_fp32_is_singular_to_fp32():
    for seed in range(20):
        inputs = torch.randn(500, 64, generator=torch.Generator().manual_seed(seed))
        inputs[:, 7] = inputs[:, 3] - inputs[:, 5]
        moment = ek.second_moment_(torch.zeros(64, 64), inputs)
        with pytest.raises(ek.EngramError, match="singular"):
            ek.Covariance.from_second_moment(moment, 500)


@pytest.mark.parametrize("diagonal", [[-1.0, -1.0, -1.0], [1.0, -2.0, 1.0], [1.0, 1.0, -1.0]])
def test_a_moment_that_is_not_positive_definite(diagonal):
    """LAPACK leaves the pivot that failed as it is, and its square looks sound."""
    with pytest.raises(ek.EngramError, match="moment: expected a positive definite matrix"):
        ek.Covariance.from_second_moment(torch.diag(torch.tensor(diagonal)), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moment": torch.ones(3, 4)}, "moment: "),
        ({"moment": torch.full((3, 3), float("nan"))}, "moment: expected finite"),
        ({"count": 0}, "count: "),
        ({"ridge": -0.1}, "ridge: "),
    ],
)
def test_bad_moment(change, message):
    with pytest.raises(ValueError, match=message):
        ek.Covariance.from_second_moment(**{"moment": torch.eye(3), "count": 1, **change})


def test_bad_keys():
    given = ek.Covariance.from_second_moment(torch.eye(3), 1)
    with pytest.raises(ValueError, match="keys: expected 3 columns"):
        given.solve(torch.ones(2, 4))
    with pytest.raises(TypeError, match="keys: "):
        given.solve(torch.ones(2, 3, dtype=torch.int32))


def test_what_is_kept_comes_back(tmp_path):
    given = ek.Covariance.from_second_moment(covariance_of(8, 10.0), 7, ridge=0.25)
    given.save_pretrained(tmp_path / "covariance")
    loaded = ek.Covariance.from_pretrained(tmp_path / "covariance")
    assert torch.equal(loaded.inverse(), given.inverse())
    assert loaded.condition == pytest.approx(given.condition)
    assert (loaded.count, loaded.ridge) == (7, 0.25)
    assert os.listdir(tmp_path) == ["covariance"]
    assert (tmp_path / "covariance" / "covariance.safetensors").stat().st_mode & 0o777 == 0o644


def test_folders_without_a_covariance(tmp_path):
    with pytest.raises(ek.EngramError, match=r"directory: expected a covariance, got .*none"):
        ek.Covariance.from_pretrained(tmp_path / "none")
    file = tmp_path / "covariance.safetensors"
    file.write_bytes(b"not safetensors")
    with pytest.raises(ek.EngramError, match="directory: expected a covariance"):
        ek.Covariance.from_pretrained(tmp_path)
    tensors = {"inverse": torch.eye(3).double(), "largest": torch.ones(1).double()}
    sound = {"format": "engram_kernels.covariance", "ridge": "0.0", "count": "1"}
    for change in ({"format": "another"}, {"count": "many"}, {"count": "0"}, {"ridge": ""}, {"ridge": "-1"}):
        save_sealed_tensors(file, tensors, {**sound, **change})
        with pytest.raises(ek.EngramError, match="directory: expected a covariance") as caught:
            ek.Covariance.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
    whole = {"inverse": torch.eye(3, dtype=torch.float64), "largest": torch.ones(1, dtype=torch.float64)}
    for change in (
        {"inverse": torch.eye(3)},
        {"inverse": whole["inverse"][:2]},
        {"inverse": whole["inverse"] / 0},
        {"inverse": torch.ones(3, dtype=torch.float64)},
        {"largest": torch.ones(2, dtype=torch.float64)},
    ):
        save_sealed_tensors(file, {**whole, **change}, sound)
        with pytest.raises(ek.EngramError, match="directory: expected a covariance"):
            ek.Covariance.from_pretrained(tmp_path)
    save_sealed_tensors(file, {"inverse": whole["inverse"]}, sound)
    with pytest.raises(ek.EngramError, match="directory: expected a covariance"):
        ek.Covariance.from_pretrained(tmp_path)
    save_sealed_tensors(file, whole, sound)
    assert ek.Covariance.from_pretrained(tmp_path).dim == 3


def test_a_changed_bit_is_refused(tmp_path):
    ek.Covariance.from_second_moment(torch.eye(3), 1).save_pretrained(tmp_path / "kept")
    flip(tmp_path / "kept" / "covariance.safetensors", -1)
    with pytest.raises(ek.EngramError, match=r"got .*covariance.safetensors is incomplete or was changed"):
        ek.Covariance.from_pretrained(tmp_path / "kept")


def test_folders_that_cannot_be_used(tmp_path):
    given = ek.Covariance.from_second_moment(torch.eye(3), 1)
    given.save_pretrained(tmp_path / "sound")
    with pytest.raises(ValueError, match="device: expected one that torch knows, got 'abacus'"):
        ek.Covariance.from_pretrained(tmp_path / "sound", device="abacus")
    with pytest.raises(ek.EngramError, match="directory: expected a new or empty one"):
        given.save_pretrained(tmp_path / "sound")


@pytest.mark.parametrize("shape", [(5, 5), (1500, 1500), (3, 40, 40)])
def test_overwriting_gives_the_same_bits_in_the_memory_of_the_moment(shape):
    inputs = torch.randn(*shape[:-2], 2 * shape[-1], shape[-1], dtype=torch.float64)
    moment = inputs.mT @ inputs
    kept = ek.Covariance.from_second_moment(moment.clone(), 9, 0.01)
    expected = moment / 9
    expected = (expected + expected.mT) / 2
    expected += 0.01 * torch.diag_embed(
        expected.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).expand(*shape[:-1])
    )
    truth = torch.linalg.inv(expected)
    assert (kept.inverse() - truth).norm() <= 1e-10 * truth.norm()
    before = moment.clone()
    assert torch.equal(ek.Covariance.from_second_moment(moment, 9, 0.01).inverse(), kept.inverse())
    assert torch.equal(moment, before)
    found = ek.Covariance.from_second_moment(moment, 9, 0.01, overwrite=True)
    assert torch.equal(found.inverse(), kept.inverse()) and found.condition == kept.condition
    assert found.inverse().data_ptr() == moment.data_ptr()


# Bytes beside the moment, at most.
PEAK = """
import resource, sys, torch
import engram_kernels as ek
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def moment(width):
    inputs = torch.randn(9, width, dtype=torch.float64)
    found = inputs.T @ inputs
    found.diagonal().add_(1.0)
    return found
ek.Covariance.from_second_moment(moment(64), 9, 0.5, overwrite=True)
given = moment(2500)
before = peak()
ek.Covariance.from_second_moment(given, 9, 0.5, overwrite=True)
sys.stderr.write(str((peak() - before) / given.nbytes))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="memory is counted in bytes otherwise elsewhere")
def test_two_matrices_are_in_memory_at_the_most(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    status, printed = child.run(PEAK)
    # The factor, and blocks of 8 MB: a fifth of this matrix each.
    assert status == 0 and float(printed) <= 1.5, printed
