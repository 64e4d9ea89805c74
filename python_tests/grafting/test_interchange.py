"""Grafts as vLLM's, TRL's and slime's updates and as PEFT's SHiRA, by their published definitions."""

import json
import zlib
from types import SimpleNamespace

import model_zoo
import numpy as np
import pytest
import torch
from editing_helpers import changed, weights
from grafting_helpers import some_graft, tuned
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engram_kernels import EngramError
from engram_kernels.grafting import (
    Graft,
    from_patches,
    read_slime,
    read_trl,
    save_shira,
    save_slime,
    save_trl,
    shard_entries,
    shard_graft,
    weight_patches,
)
from engram_kernels.grafting.tuned import tuned_tensors


def same(one, two):
    return one.indices.keys() == two.indices.keys() and all(
        torch.equal(one.indices[name], two.indices[name]) and torch.equal(one.values[name], two.values[name])
        for name in one.indices
    )


@pytest.fixture
def half():
    model = model_zoo.small_model(dtype=torch.bfloat16)
    return model, some_graft(model, count=3000)


def named(model):
    return {name: weight.detach() for name, weight in model.named_parameters()}


# -- vLLM ----------------------------------------------------------------------------------------------------


def nan_staging(weights, patches):
    """What vLLM's loader does: a tensor of NaN for each patch, the values in it, copied where not NaN."""
    for patch in patches:
        flat = torch.full((torch.Size(patch.shape).numel(),), float("nan"), dtype=patch.dtype)
        flat.index_copy_(0, patch.indices.long(), patch.values)
        staged, target = flat.view(patch.shape), weights[patch.name]
        torch.where(staged.isnan(), target, staged, out=target)


def test_vllm_makes_of_patches_what_the_graft_makes(half):
    model, graft = half
    with graft.apply(model):
        expected = weights(model)
    staged = weights(model)
    nan_staging(staged, weight_patches(graft))
    assert all(torch.equal(staged[name], expected[name]) for name in expected)


def test_patches_are_read_in_any_order(half):
    model, graft = half
    patches = []
    for patch in weight_patches(graft):
        order = torch.randperm(len(patch.indices))
        patches.append(
            SimpleNamespace(name=patch.name, indices=patch.indices.long()[order], values=patch.values[order])
        )
    read = from_patches(patches, model)
    assert same(read, graft)
    with read.apply(model):
        pass


def test_patches_that_do_not_fit_are_refused(half):
    model, graft = half
    first = weight_patches(graft)[0]
    twice = first._replace(indices=torch.cat([first.indices] * 2), values=torch.cat([first.values] * 2))
    for bad, message in (
        (twice, "patches: indices: expected ascending positions"),
        (first._replace(indices=first.indices - 10**6), "patches: indices: expected ascending positions"),
        (first._replace(values=first.values.float()), "patches: expected torch.bfloat16 in"),
        (first._replace(name="other"), "base: expected a tensor 'other'"),
    ):
        with pytest.raises(EngramError, match=f"^{message}"):
            from_patches([bad], model)
    with pytest.raises(EngramError, match=r"^patches: expected one for each parameter, got two for 'model"):
        from_patches([first, first], model)
    graft.values[first.name][0] = float("nan")
    with pytest.raises(EngramError, match="graft: expected no NaN, which vLLM takes as unchanged"):
        weight_patches(graft)


# -- TRL -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["gap_delta", "raw"])
def test_trl_reads_what_is_written(half, tmp_path, encoding):
    model, graft = half
    graft.indices["lm_head.weight"] = torch.tensor([0, 1, 12000], dtype=torch.int32)
    graft.values["lm_head.weight"] = torch.ones(3, dtype=torch.bfloat16)
    graft.shapes["lm_head.weight"] = tuple(model.lm_head.weight.shape)
    save_trl(graft, tmp_path / "step.safetensors", 3, encoding)
    with safe_open(tmp_path / "step.safetensors", "pt") as file:
        metadata = file.metadata()
        assert metadata["encoding"] == encoding and metadata["model_version"] == "3"
        assert metadata["sparse"] == "True" and int(metadata["total_changed_elements"]) == graft.size
        for name, at in graft.indices.items():
            stored = file.get_tensor(f"{name}.idx")
            # TRL's own decoding: gaps of the width that the dtype says, counted from −1.
            got = torch.cumsum(stored.long() + 1, 0) - 1 if encoding == "gap_delta" else stored.long()
            assert torch.equal(got, at.long())
            assert stored.dtype == (torch.uint16 if encoding == "gap_delta" else torch.int32)
    assert same(read_trl(tmp_path / "step.safetensors", model), graft)


def test_gaps_beyond_two_bytes():
    from engram_kernels.grafting.interchange import _gaps, _positions

    at = torch.tensor([5, 6, 65542, 131079])
    assert _gaps(at[:3]).dtype == torch.uint16 and _gaps(at).dtype == torch.uint32
    assert torch.equal(_positions(_gaps(at)), at) and _gaps(at[:0]).numel() == 0


def test_bad_trl_files(half, tmp_path):
    model, graft = half
    with pytest.raises(ValueError, match=r"^encoding: expected 'gap_delta' or 'raw', got 'nvcomp_cascaded'"):
        save_trl(graft, tmp_path / "x.safetensors", 1, "nvcomp_cascaded")
    with pytest.raises(EngramError, match=r"graft: expected bfloat16, which TRL serves, got torch\.float32"):
        save_trl(some_graft(model_zoo.small_model()), tmp_path / "x.safetensors", 1)
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(EngramError, match="path: expected a delta file of TRL"):
        read_trl(tmp_path / "x.safetensors", model)


# -- slime ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slime_makes_of_a_delta_what_the_graft_makes(tmp_path, dtype):
    zstandard = pytest.importorskip("zstandard")
    model = model_zoo.small_model(dtype=dtype)
    graft = some_graft(model, count=3000)
    save_slime(graft, model, tmp_path / "weight_v000004", 4)
    index = json.loads((tmp_path / "weight_v000004" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["version"] == "000004" and index["metadata"]["base_version"] == "000003"
    with graft.apply(model):
        expected = weights(model)
    (path,) = (tmp_path / "weight_v000004").glob("*.safetensors")
    with safe_open(path, "pt") as file:
        checksums = file.metadata()
    for name, packed in load_file(path).items():
        # slime's own application of `overwrite`.
        delta = np.frombuffer(zstandard.ZstdDecompressor().decompress(packed.numpy().tobytes()), np.uint8)
        region = model.get_parameter(name).detach().clone().view(torch.uint8).numpy().reshape(-1)
        count = int.from_bytes(delta[:4].tobytes(), "little")
        positions = np.frombuffer(delta[4 : 4 + 4 * count].tobytes(), "<u4")
        region[positions] = delta[4 + 4 * count :]
        assert f"{zlib.adler32(region):08x}" == checksums[name]
        assert np.array_equal(region, expected[name].view(torch.uint8).numpy().reshape(-1))
    assert same(read_slime(tmp_path / "weight_v000004", model), graft)
    with pytest.raises(EngramError, match="a tensor becomes another one than its checksum says"):
        read_slime(tmp_path / "weight_v000004", tuned(model))
    index["metadata"]["delta_encoding"] = "xor"
    (tmp_path / "weight_v000004" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EngramError, match=r"expected a disk delta of slime, .*it uses xor, zstd, adler32"):
        read_slime(tmp_path / "weight_v000004", model)


@pytest.mark.parametrize("told", [True, False])
def test_a_delta_that_unpacks_to_more_than_a_tensor_is_refused(half, tmp_path, told):
    """Whether its size is written at its beginning or not."""
    zstandard = pytest.importorskip("zstandard")
    model, graft = half
    save_slime(graft, model, tmp_path / "delta", 1)
    (path,) = (tmp_path / "delta").glob("*.safetensors")
    with safe_open(path, "pt") as file:
        checksums = file.metadata()
    tensors = load_file(path)
    name = next(iter(tensors))
    large = bytes(5 + 5 * model.get_parameter(name).nbytes)
    packed = zstandard.ZstdCompressor(write_content_size=told).compress(large)
    tensors[name] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    save_file(tensors, path, checksums)
    kind = "it unpacks to more than the tensor has" if told else "decompress"
    with pytest.raises(EngramError, match=rf"^directory: expected a disk delta of slime, .*{kind}"):
        read_slime(tmp_path / "delta", model)


def test_slimes_compression_is_asked_for(half, tmp_path, monkeypatch):
    model, graft = half
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(EngramError, match="zstandard is needed for slime's deltas: pip install zstandard"):
        save_slime(graft, model, tmp_path / "new", 1)


# -- SHiRA ---------------------------------------------------------------------------------------------------


def test_peft_adds_what_the_graft_sets(tmp_path):
    peft = pytest.importorskip("peft")
    import copy

    model = model_zoo.small_model()
    ft = {name: weight for name, weight in named(tuned(model)).items() if "proj" in name}
    pre = {name: named(model)[name] for name in ft}
    dense = Graft.from_difference(pre, ft, 0.1)
    before = weights(model)
    save_shira(dense, model, tmp_path / "shira")
    assert not changed(before, model)
    with dense.apply(model):
        expected = weights(model)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "shira")
    merged = dict(loaded.merge_and_unload().named_parameters())
    for name, weight in expected.items():
        # base + (value − base) is the value but for its last bit.
        torch.testing.assert_close(merged[name].detach(), weight, rtol=1e-6, atol=1e-7)
        assert torch.equal(merged[name] == before[name], weight == before[name])
    read = tuned_tensors(tmp_path / "shira", model, list(pre), "tuned")
    assert all(torch.equal(read[name], merged[name].detach()) for name in pre)


def test_what_shira_cannot_hold_is_refused(tmp_path):
    model = model_zoo.small_model()
    graft = some_graft(model, count=5)
    name = "model.layers.0.input_layernorm.weight"
    graft.indices, graft.values = {name: torch.tensor([3], dtype=torch.int32)}, {name: torch.ones(1)}
    with pytest.raises(EngramError, match=r"graft: expected weights of nn\.Linear, which SHiRA adapts, got"):
        save_shira(graft, model, tmp_path / "shira")
    assert not list(tmp_path.iterdir())


# -- shards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_shards_together_are_the_whole(dim, world):
    shape = (6, 7, 4)
    old, new = torch.zeros(shape), torch.where(torch.rand(shape) < 0.3, torch.rand(shape), 0.0)
    at = new.flatten().nonzero().flatten().int()
    parts = []
    for rank, part in enumerate(torch.chunk(old, world, dim)):
        length = -(-shape[dim] // world)
        start = rank * length
        stop = min(start + length, shape[dim])
        mine, values = shard_entries(at, new.flatten()[at.long()], shape, dim, start, stop)
        assert mine.dtype == torch.int32 and bool((mine[1:] > mine[:-1]).all())
        part = part.clone().contiguous()
        part.view(-1)[mine.long()] = values
        parts.append(part)
    assert torch.equal(torch.cat(parts, dim), new)


def test_a_packed_parameter_holds_its_parts():
    """As vLLM packs q, k and v: the rows of each rank's parts below one another."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(8, 5, generator=generator), torch.randn(4, 5, generator=generator)
    packed = torch.zeros(6, 5)  # of rank 1 of 2: four rows of q, two of k
    for weight, offset in ((q, 0), (k, 4)):
        rows = len(weight) // 2
        at = torch.arange(weight.numel())
        mine, values = shard_entries(at, weight.flatten(), weight.shape, 0, rows, 2 * rows, offset, 6)
        packed.view(-1)[mine] = values
    assert torch.equal(packed, torch.cat([q[4:], k[2:]]))


def test_a_graft_is_sharded_by_a_plan():
    model = model_zoo.small_model()
    graft = some_graft(model, count=5000)
    plan = {"*q_proj": "colwise", "*.o_proj": "rowwise", "*down_proj.weight": 1}
    parts = [shard_graft(graft, plan, rank, 2) for rank in range(2)]
    with graft.apply(model):
        whole = weights(model)
    for name, shape in graft.shapes.items():
        dim = 0 if "q_proj" in name else 1 if "o_proj" in name or "down_proj" in name else None
        for rank in range(2):
            weight = model.get_parameter(name).detach()
            own = weight if dim is None else torch.chunk(weight, 2, dim)[rank]
            own = own.clone().contiguous()
            if name in parts[rank]:
                at, values = parts[rank][name]
                own.view(-1)[at.long()] = values
            expected = whole[name] if dim is None else torch.chunk(whole[name], 2, dim)[rank]
            assert torch.equal(own, expected), (name, shape)
    for arguments, message in (
        ((plan, 2, 2), "rank: expected below 2, got 2"),
        (({"*": "sideways"}, 0, 2), "plan: expected 'colwise', 'rowwise' or a dimension, got 'sideways'"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            shard_graft(graft, *arguments)
