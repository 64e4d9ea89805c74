"""Sparse differences on every backend that exists here, bit for bit against plain comparisons."""

import pytest
import torch

import engram_kernels as ek

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Around a vector, a byte of bits, a chunk of the C++ kernels, a block of the GPU's, and of several.
SIZES = [0, 1, 7, 8, 9, 31, 33, 2047, 2048, 2049, 8191, 8192, 8193, 20001]


def pair(size, dtype, share=0.3):
    """Two tensors that differ in a share of their entries."""
    generator = torch.Generator().manual_seed(size)
    old = torch.randn(size, generator=generator).to(dtype)
    step = torch.randn(size, generator=generator).to(dtype)
    return old, torch.where(torch.rand(size, generator=generator) < share, old + step, old)


def plain(old, new, threshold=None):
    """What changed, by the definition."""
    bits = BITS[old.element_size()]
    changed = old.view(bits) != new.view(bits)
    if threshold is not None:
        wide = torch.float64 if old.dtype == torch.float64 else torch.float32
        changed &= ~((new.to(wide) - old.to(wide)).abs() <= threshold)
    return changed.nonzero().flatten()


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_changed_in_order(device, poisoned, dtype, threshold, index):
    pairs = [pair(size, dtype) for size in SIZES]
    old, new = ([x.to(device) for x in side] for side in zip(*pairs, strict=True))
    indices, values = ek.sparse_diff(old, new, threshold, index)
    for (before, after), at, value in zip(pairs, indices, values, strict=True):
        expected = plain(before, after, threshold)
        assert at.dtype == index and value.dtype == dtype
        assert torch.equal(at.cpu().long(), expected) and torch.equal(value.cpu(), after[expected])
    assert sum(map(len, indices)) > 1000


def test_dtypes_and_shapes_are_mixed(device):
    pairs = [pair(size, dtype) for dtype in DTYPES for size in (0, 63, 4100)]
    old, new = ([x.to(device).view(-1, 1) for x in side] for side in zip(*pairs, strict=True))
    indices, values = ek.sparse_diff(old, new)
    assert {at.dtype for at in indices} == {torch.int32}
    overwritten = ek.sparse_apply_(old, indices, values)
    assert all(torch.equal(x, y) for x, y in zip(old, new, strict=True))
    ek.sparse_apply_(old, indices, overwritten)
    assert all(torch.equal(x.cpu().flatten(), before) for x, (before, _) in zip(old, pairs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_decide(device, dtype):
    nan, inf = float("nan"), float("inf")
    old = torch.tensor([0.0, nan, 1.0, nan, inf, inf, 2.0], dtype=dtype, device=device)
    new = torch.tensor([-0.0, nan, nan, 1.0, inf, -inf, 2.0], dtype=dtype, device=device)
    assert ek.sparse_diff([old], [new]).indices[0].tolist() == [0, 2, 3, 5]
    # Beyond a threshold: −0 is 0, and a difference that is NaN counts.
    assert ek.sparse_diff([old], [new], 0.0).indices[0].tolist() == [2, 3, 5]
    (at,), (values,) = ek.sparse_diff([new], [old])
    assert torch.equal(values.view(torch.uint8), old[at.long()].view(torch.uint8))


def test_the_threshold_itself_is_no_change(device):
    old = torch.tensor([1.0, 1.0, 1.0, -1.0], device=device)
    new = torch.tensor([1.5, 1.25, 0.5, -1.75], device=device)
    assert ek.sparse_diff([old], [new], 0.5).indices[0].tolist() == [3]


def test_nothing_and_everything(device):
    old = torch.zeros(9001, dtype=torch.bfloat16, device=device)
    assert [x.numel() for x in (*ek.sparse_diff([old], [old])[0], *ek.sparse_diff([old], [old])[1])] == [0, 0]
    (at,), (values,) = ek.sparse_diff([old], [old + 1])
    assert torch.equal(at.cpu(), torch.arange(9001, dtype=torch.int32)) and bool((values == 1).all())
    assert ek.sparse_diff([], []) == ([], [])


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_strided_and_misaligned_tensors_are_read(device, shift):
    old, new = (torch.randn(41, 90, device=device)[:, shift::2].T for _ in range(2))
    (at,), (values,) = ek.sparse_diff([old], [new], 1.0)
    (expected,) = ek.sparse_diff([old.contiguous()], [new.contiguous()], 1.0).indices
    assert torch.equal(at, expected) and torch.equal(values, new.reshape(-1)[at.long()])
    flat = torch.randn(2, 3000, device=device).bfloat16()
    (at,), _ = ek.sparse_diff([flat[0, shift:]], [flat[1, shift:]])
    assert torch.equal(at.cpu().long(), plain(flat[0, shift:].cpu(), flat[1, shift:].cpu()))


def test_many_small_tensors(device):
    pairs = [pair(size % 40, torch.float16) for size in range(300)]
    old, new = ([x.to(device) for x in side] for side in zip(*pairs, strict=True))
    for (before, after), at in zip(pairs, ek.sparse_diff(old, new).indices, strict=True):
        assert torch.equal(at.cpu().long(), plain(before, after))


def test_parameters_are_read_without_a_graph():
    old, new = torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.ones(5))
    (_,), (values,) = ek.sparse_diff([old], [new])
    assert not values.requires_grad


def test_compiles_whole():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def synchronise(old, new):
        return ek.sparse_diff(old, new)

    for size in (30, 41):
        old, new = pair(size, torch.float32)
        expected = plain(old, new)
        indices, values = synchronise([old, old], [old, new])
        assert torch.equal(indices[1].long(), expected) and torch.equal(values[1], new[expected])
        assert indices[0].numel() == values[0].numel() == 0


X = torch.zeros(4)
BAD = {
    "one more": (([X], [X, X]), {}, ValueError, "new: expected 1 tensors, got 2"),
    "another shape": (([X], [torch.zeros(5)]), {}, ValueError, r"new: expected shape \[4\]"),
    "another dtype": (([X], [X.half()]), {}, TypeError, "new: expected a tensor of float32, got float16"),
    "integers": (([X.int()], [X.int()]), {}, TypeError, "old: expected a tensor of float32"),
    "no list": ((X, X), {}, TypeError, "old: expected a list of tensors, got Tensor"),
    "negative": (([X], [X]), {"threshold": -1.0}, ValueError, "threshold: expected a finite number"),
    "NaN": (([X], [X]), {"threshold": float("nan")}, ValueError, "threshold: expected a finite number"),
    "text": (([X], [X]), {"threshold": "1"}, TypeError, "threshold: expected a number, got str"),
    "index": (([X], [X]), {"index_dtype": torch.int16}, TypeError, "index_dtype: expected torch.int32 or"),
    "meta": (([X], [X.to("meta")]), {}, ValueError, "new: expected a tensor on cpu, got one on meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, options, error, message = BAD[case]
    with pytest.raises(error, match=f"^{message}"):
        ek.sparse_diff(*arguments, **options)


def test_int32_numbers_two_billion_entries_and_no_more():
    from engram_kernels.ops.graft_diff import NARROW, _check_pair

    huge = torch.empty(NARROW + 1, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match=r"^index_dtype: expected int64 for 2147483649 entries, got int32$"):
        _check_pair([huge], [huge], None, wide=False)
    _check_pair([huge], [huge], None, wide=True)
    _check_pair([huge[1:]], [huge[1:]], None, wide=False)
