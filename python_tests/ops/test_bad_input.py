"""Bad input to the public functions: a sentence that names the argument, and nothing changed."""

import pytest
import torch

import engram_kernels as ek

NAN = float("nan")


@pytest.fixture
def write():
    return {
        "weight": torch.randn(5, 7),
        "keys": torch.randn(3, 7),
        "values": torch.randn(3, 5),
        "inverse_covariance": torch.eye(7),
    }


def poison(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[1, 2] = NAN
    return tensor


def dependent(keys: torch.Tensor) -> torch.Tensor:
    return keys[[0, 1, 0]]


BAD_WRITES = {
    "integer weight": ({"weight": torch.ones(5, 7, dtype=torch.int32)}, TypeError, "weight: .*int32"),
    "integer keys": ({"keys": torch.ones(3, 7, dtype=torch.int64)}, TypeError, "keys: .*int64"),
    "list of values": ({"values": [1.0]}, TypeError, "values: expected a tensor, got list"),
    "weight of one dimension": ({"weight": torch.ones(7)}, ValueError, "weight: "),
    "keys of another width": ({"keys": torch.ones(3, 6)}, ValueError, r"keys: expected shape \[3, 7\]"),
    "keys with a batch": ({"keys": torch.ones(1, 3, 7)}, ValueError, "keys: "),
    "values of another width": ({"values": torch.ones(3, 4)}, ValueError, r"values: expected shape \[3, 5\]"),
    "values of another count": ({"values": torch.ones(2, 5)}, ValueError, r"values: expected shape \[3, 5\]"),
    "covariance of another width": (
        {"inverse_covariance": torch.eye(6)},
        ValueError,
        r"inverse_covariance: expected shape \[7, 7\]",
    ),
    "covariance with a batch": (
        {"inverse_covariance": torch.ones(2, 7, 7)},
        ValueError,
        r"inverse_covariance: expected shape \[in, in\], as weight has no batch, got \[2, 7, 7\]",
    ),
    "covariance a string": (
        {"covariance": "wikipedia", "inverse_covariance": None},
        TypeError,
        "covariance: expected a Covariance.*got str",
    ),
    "covariance a tensor": (
        {"covariance": torch.eye(7), "inverse_covariance": None},
        TypeError,
        "covariance: expected a Covariance .*inverse_covariance.*got Tensor",
    ),
    "inverse covariance a Covariance": (
        {"inverse_covariance": ek.Covariance.from_second_moment(torch.eye(7), 1)},
        TypeError,
        "inverse_covariance: expected a tensor, got Covariance",
    ),
    "no covariance": (
        {"inverse_covariance": None},
        ValueError,
        "covariance: expected either it or inverse_covariance, got neither",
    ),
    "two covariances": (
        {"covariance": ek.Covariance.from_second_moment(torch.eye(7), 1)},
        ValueError,
        "covariance: expected either it or inverse_covariance, got both",
    ),
    "NaN key": ({"keys": poison}, ValueError, "keys: expected finite values, got 1 NaN"),
    "infinite value": ({"values": lambda v: v / 0}, ValueError, "values: expected finite"),
    "NaN weight": ({"weight": poison}, ValueError, "weight: expected finite"),
    "NaN covariance": ({"inverse_covariance": poison}, ValueError, "inverse_covariance: expected finite"),
    "zero key": (
        {"keys": lambda k: k * torch.tensor([[1.0], [0], [1]])},
        ValueError,
        "keys: expected no zero key",
    ),
    "repeated key": ({"keys": dependent}, ek.EngramError, "keys: .*key 2 dependent.*ridge"),
    "indefinite covariance": (
        {"inverse_covariance": -torch.eye(7)},
        ek.EngramError,
        "inverse_covariance: .*positive definite",
    ),
    "asymmetric covariance": (
        {"inverse_covariance": torch.eye(7) + torch.ones(7, 7).triu(1)},
        ValueError,
        "inverse_covariance: expected a symmetric matrix",
    ),
    "keys too small": ({"keys": lambda k: k * 1e-25}, ek.EngramError, "keys: .*overflow"),
    "alpha beyond the type": ({"alpha": 1e300}, ValueError, "alpha: expected at most 3.4e"),
    "unknown mode": (
        {"mode": "rome"},
        ValueError,
        "mode: expected one of joint, sequential, independent, got 'rome'",
    ),
    "negative ridge": ({"ridge": -1.0}, ValueError, "ridge: "),
    "NaN ridge": ({"ridge": NAN}, ValueError, "ridge: "),
    "ridge of another mode": ({"mode": "sequential", "ridge": 1.0}, ValueError, "ridge: expected 0"),
    "NaN alpha": ({"alpha": NAN}, ValueError, "alpha: "),
    "alpha a tensor": ({"alpha": torch.ones(1)}, TypeError, "alpha: "),
}


@pytest.mark.parametrize("case", BAD_WRITES)
def test_bad_write(write, case):
    change, kind, message = BAD_WRITES[case]
    for name, value in change.items():
        write[name] = value(write[name]) if callable(value) else value
    before = {name: value.clone() for name, value in write.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(kind, match=message) as caught:
        ek.low_rank_update(**write)
    assert "\n" not in str(caught.value)
    for name, value in before.items():
        assert torch.equal(write[name].nan_to_num(7.0), value.nan_to_num(7.0)), name


BAD_UPDATES = {
    "integer weight": ({"weight": torch.ones(5, 7, dtype=torch.int8)}, TypeError, "weight: "),
    "left of another height": ({"left": torch.ones(4, 2)}, ValueError, "left: expected shape"),
    "right of another rank": ({"right": torch.ones(3, 7)}, ValueError, "right: expected shape"),
    "right with a batch": ({"right": torch.ones(1, 2, 7)}, ValueError, "right: "),
    "NaN left": ({"left": torch.full((5, 2), NAN)}, ValueError, "left: expected finite"),
    "infinite right": ({"right": torch.full((2, 7), float("inf"))}, ValueError, "right: expected finite"),
    "infinite alpha": ({"alpha": float("inf")}, ValueError, "alpha: "),
}


@pytest.mark.parametrize("case", BAD_UPDATES)
@pytest.mark.parametrize("backend", [name for name in ("torch", "cpu") if ek.backends()[name] is None])
def test_bad_update_changes_nothing(case, backend):
    change, kind, message = BAD_UPDATES[case]
    args = {"weight": torch.randn(5, 7), "left": torch.randn(5, 2), "right": torch.randn(2, 7), **change}
    before = args["weight"].clone()
    with ek.use_backend(backend), pytest.raises(kind, match=message):
        ek.apply_low_rank_(**args)
    assert torch.equal(args["weight"], before)


def test_overlapping_weights_and_aliasing_factors_are_refused():
    row = torch.zeros(1, 8)
    with pytest.raises(ValueError, match="weight: expected elements that do not overlap"):
        ek.apply_low_rank_(row.expand(3, 8), torch.ones(3, 1), torch.ones(1, 8))
    with pytest.raises(ValueError, match="weight: expected elements that do not overlap"):
        ek.apply_low_rank_(torch.zeros(10).as_strided((3, 4), (2, 1)), torch.ones(3, 1), torch.ones(1, 4))
    assert not row.any()
    weight = torch.randn(20, 7)
    before = weight.clone()
    with pytest.raises(ValueError, match="right: expected memory of its own"):
        ek.apply_low_rank_(weight, torch.ones(20, 8), weight[:8])
    assert torch.equal(weight, before)


def test_halves_of_one_buffer_are_memory_of_their_own():
    buffer = torch.randn(40)
    weight, left = buffer[:20].view(4, 5), buffer[20:28].view(4, 2)
    expected = weight + left @ torch.ones(2, 5)
    torch.testing.assert_close(ek.apply_low_rank_(weight, left, torch.ones(2, 5)), expected)


def test_states_that_are_also_read_are_refused():
    moment = torch.eye(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="inputs: expected memory of its own"):
        ek.second_moment_(moment, moment[:2])
    with pytest.raises(ValueError, match="B: expected memory of its own"):
        ek.memory_accumulate_(moment, moment, torch.ones(2, 4), torch.ones(2, 4))
    assert torch.equal(moment, torch.eye(4, dtype=torch.float64))


def test_strided_tensors_that_are_also_read_are_refused():
    memory, (pre, ft, gradient) = torch.zeros(4, 6), torch.randn(3, 6, 4)
    logits = [memory.T]
    message = "expected memory of its own for a strided tensor, got shared memory"
    for call in (
        lambda: ek.graft_mask_step_(logits, [gradient], [pre], [ft], out=[memory.T]),
        lambda: ek.graft_mask_step_(logits, [gradient], [pre], [ft], out=[memory.view(6, 4)]),
        lambda: ek._foreach_graft_blend_([memory.T], [pre], [ft], logits),
        lambda: ek.sparse_apply_(logits, [torch.tensor([1])], [memory[0, :1]]),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not memory.any()


def test_a_matrix_of_zeros_has_no_full_rank():
    with pytest.raises(ek.EngramError, match="a: expected a matrix of full rank"):
        ek.pseudo_inverse(torch.zeros(3, 3), ridge=0.0)


BAD_MOMENTS = {
    "half accumulator": ({"accumulator": torch.zeros(7, 7).half()}, TypeError, "accumulator: "),
    "accumulator of another width": (
        {"accumulator": torch.zeros(6, 6)},
        ValueError,
        "accumulator: expected shape",
    ),
    "integer inputs": ({"inputs": torch.ones(4, 7, dtype=torch.long)}, TypeError, "inputs: "),
    "NaN inputs": ({"inputs": torch.full((4, 7), NAN)}, ValueError, "inputs: expected finite"),
    "mask of another length": ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask: expected shape"),
    "integer mask": ({"mask": torch.ones(4)}, TypeError, "mask: "),
}


@pytest.mark.parametrize("case", BAD_MOMENTS)
def test_bad_second_moment_changes_nothing(case):
    change, kind, message = BAD_MOMENTS[case]
    args = {"accumulator": torch.zeros(7, 7), "inputs": torch.randn(4, 7), **change}
    before = args["accumulator"].clone()
    with pytest.raises(kind, match=message):
        ek.second_moment_(**args)
    assert torch.equal(args["accumulator"], before)


def test_masked_rows_may_hold_anything():
    inputs = torch.randn(4, 7)
    inputs[2] = NAN
    moment = ek.second_moment_(torch.zeros(7, 7), inputs, torch.tensor([True, True, False, True]))
    assert torch.isfinite(moment).all()
