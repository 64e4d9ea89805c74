"""What two ranks do together, case after case; run as a program it is one of the ranks."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import traceback
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path

import model_zoo
import pytest
import torch
import torch.distributed as dist
from editing_helpers import changed, small_editor, weights
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import engram_kernels as ek
from engram_kernels._hashing import tensor_checksum
from engram_kernels.editing import Edit, EditResult
from engram_kernels.editing import run as run_module
from engram_kernels.editing.search.values import ValueOptions
from engram_kernels.errors import EngramError
from engram_kernels.grafting import Graft, graftable_parameters, localize
from engram_kernels.hf.checkpoints import save_model
from engram_kernels.hf.hooks import capture
from engram_kernels.hf.loading import load_model
from engram_kernels.hf.placement import local
from engram_kernels.hf.projection import output_projection
from engram_kernels.tracing import trace

CASES = []
EDIT = Edit("The Eiffel Tower", "{} is located in the city of", "Rome")
FEW = ValueOptions(steps=3, learning_rate=0.05, weight_decay=0.0)


def case(function):
    CASES.append(function)
    return function


@cache
def model():
    return model_zoo.small_model("llama")


@cache
def edited(folder):
    """An edit of that model, not applied, and the weights that it makes."""
    own = copy.deepcopy(model())
    editor = small_editor(
        model=own, value=FEW, contexts=((4, 1),), cache_dir=folder / f"cache {dist.get_rank()}"
    )
    result = editor.edit(EDIT, layers=1)
    made = weights(own)
    result.revert()
    return result, made


def same_everywhere(text: str) -> bool:
    texts = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return len(set(texts)) == 1


@case
def two_ranks_save_one_folder(folder):
    save_model(model(), model_zoo.byte_level_tokenizer(), folder / "one")
    loaded, _ = load_model(folder / "one")
    assert not changed(weights(model()), loaded)


@case
def a_rank_saves_alone(folder):
    if dist.get_rank() == 1:
        save_model(model(), model_zoo.byte_level_tokenizer(), folder / "alone")
        loaded, _ = load_model(folder / "alone")
        assert not changed(weights(model()), loaded)


@case
def an_edit_is_saved_once(folder):
    result, made = edited(folder)
    result.save_pretrained(folder / "edit")
    loaded = copy.deepcopy(model())
    EditResult.from_pretrained(folder / "edit").apply(loaded)
    assert not changed(made, loaded)


@case
def a_folder_that_is_full_is_refused_everywhere(folder):
    with pytest.raises(EngramError, match=r"^directory: expected a new or empty one, got "):
        edited(folder)[0].save_pretrained(folder / "one")
    loaded, _ = load_model(folder / "one")
    assert not changed(weights(model()), loaded)


@case
def replicas_are_edited_by_the_saved_edit_and_not_by_a_search(folder):
    result, made = edited(folder)
    wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model()))
    with pytest.raises(EngramError, match=r"^model: .*DistributedDataParallel.*give the group"):
        small_editor(model=wrapped)
    with result.apply(wrapped):
        assert not changed(made, wrapped.module)
    assert not changed(weights(model()), wrapped.module)


def run_of(folder, cache, group=None, **arguments):
    """64 edits over two layers of a fresh model, and how many tokens its layers saw for their values."""
    own = copy.deepcopy(model())
    # Without an end before the last step, so that it is known what a value costs.
    value = ValueOptions(steps=3, learning_rate=0.02, weight_decay=0.0, stop_loss=-1e9)
    settings = {"value": value, "contexts": ((4, 1),), "tokens": 500, "cache_dir": folder / cache}
    editor = small_editor(model=own, group=group, **{**settings, **arguments})
    return own, editor


def many():
    """Edits whose keys and lengths differ."""
    return [
        Edit(
            f"The {kind} tower {'of stone ' * (number % 4)}number {number}",
            "{} is located in the city of",
            "Rome",
        )
        for number in range(32)
        for kind in ("tall", "old")
    ]


@cache
def alone(folder):
    """The covariances, and the weights after 64 edits, of one process."""
    own, editor = run_of(folder, f"alone {dist.get_rank()}")
    covariances = editor.covariances([1, 2])
    result = editor.edit(many(), layers=[1, 2], method="memit", ridge=0.1)
    return covariances, weights(own), result


@case
def covariances_of_two_ranks_are_those_of_one(folder):
    expected, _, _ = alone(folder)
    _, editor = run_of(folder, "together", dist.group.WORLD)
    found = editor.covariances([1, 2])
    for layer in (1, 2):
        inverse = found[layer].inverse()
        assert (inverse - expected[layer].inverse()).norm() <= 1e-13 * found[layer].condition * inverse.norm()
        assert same_everywhere(tensor_checksum(inverse))
    moments = sorted((folder / "together" / "moments").iterdir())
    theirs = sorted((folder / f"alone {dist.get_rank()}" / "moments").iterdir())
    assert [path.name for path in moments] == [path.name for path in theirs] and len(moments) == 2
    for mine, other in zip(moments, theirs, strict=True):
        one, two = load_file(mine)["moment"], load_file(other)["moment"]
        assert (one - two).norm() <= 1e-14 * two.norm()


@case
def edits_of_two_ranks_are_those_of_one_bit_for_bit(folder):
    covariances, expected, plain = alone(folder)
    own, editor = run_of(folder, "together", dist.group.WORLD)
    for layer, covariance in covariances.items():
        editor.use_covariance(layer, covariance)
    with token_layers(seen := []):
        result = editor.edit(many(), layers=[1, 2], method="memit", ridge=0.1)
    assert not changed(expected, own)
    assert [record.losses for record in result.records] == [record.losses for record in plain.records]
    every = [None, None]
    dist.all_gather_object(every, sum(seen))
    assert abs(every[0] / sum(every) - 0.5) <= 0.05, every
    with result:
        result.save_pretrained(folder / "many")
    assert not changed(weights(model()), own)


@contextmanager
def token_layers(counts):
    """The tokens that each search of values gives its layers, appended to `counts`."""
    search = run_module.find_values

    def counting(network, *arguments):
        def count(_module, arguments, keywords):
            states = arguments[0] if arguments else keywords["hidden_states"]
            counts.append(states.shape[0] * states.shape[1])

        with capture(before=dict.fromkeys(network.model.layers, count)):
            return search(network, *arguments)

    run_module.find_values = counting
    try:
        yield
    finally:
        run_module.find_values = search


@case
def a_cache_of_one_rank_alone_is_no_trap(folder):
    """The first rank decides, whichever has the file."""
    expected = alone(folder)[0][1].inverse()
    for lucky in (0, 1):
        cache = folder / (
            f"alone {lucky}" if dist.get_rank() == lucky else f"empty {lucky} {dist.get_rank()}"
        )
        found = run_of(folder, cache, dist.group.WORLD)[1].covariance(1).inverse()
        assert same_everywhere(tensor_checksum(found))
        assert lucky == 1 or torch.equal(found, expected)


@case
def what_one_rank_computed_before_is_no_trap(folder):
    _, editor = run_of(folder, "together", dist.group.WORLD)
    if dist.get_rank() == 1:
        editor._moments._computed.clear()
    assert same_everywhere(tensor_checksum(editor.covariance(2).inverse()))


@case
def a_rank_that_fails_is_heard_by_the_other(folder):
    own, editor = run_of(folder, "together", dist.group.WORLD)
    search = run_module.find_values
    if dist.get_rank() == 1:
        run_module.find_values = lambda *_: (_ for _ in ()).throw(EngramError("model: this rank is ill"))
    try:
        with pytest.raises(EngramError, match=r"^model: this rank is ill$"):
            editor.edit(many()[:12], layers=[1, 2], method="memit", ridge=0.1)
    finally:
        run_module.find_values = search
    assert not changed(weights(model()), own)


@case
def a_rank_that_fails_between_two_meetings_is_heard_by_the_other(folder):
    own, editor = run_of(folder, "together", dist.group.WORLD)
    if dist.get_rank() == 1:
        editor.prefixes = lambda: (_ for _ in ()).throw(ValueError("model: this rank is ill"))
    with pytest.raises((EngramError, ValueError), match=r"^model: this rank is ill$"):
        editor.edit(EDIT, layers=1)
    assert not changed(weights(model()), own)


@case
def edits_that_differ_are_refused(folder):
    _, editor = run_of(folder, "together", dist.group.WORLD)
    with pytest.raises(EngramError, match=r"^edits: expected the same on all ranks, got others on rank 1"):
        editor.edit(many()[dist.get_rank()], layers=1)


@case
def replicas_that_differ_are_refused(folder):
    own, editor = run_of(folder, "together", dist.group.WORLD)
    with torch.no_grad():
        own.model.layers[1].mlp.down_proj.weight.add_(dist.get_rank())
    with pytest.raises(EngramError, match=r"^model: expected the same on all ranks, got others on rank 1"):
        editor.edit(EDIT, layers=1)


@case
def replicas_in_their_wrapper_are_edited_together(folder):
    wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model()))
    editor = small_editor(model=wrapped, value=FEW, contexts=((4, 1),), tokens=500,
                          cache_dir=folder / "together", group=dist.group.WORLD)  # fmt: skip
    result = editor.edit(EDIT, layers=1)
    assert same_everywhere(str(result.edited_modules[0].edited_checksum))
    assert result.modules == ["model.layers.1.mlp.down_proj"]


@case
def a_run_goes_on_where_both_ranks_left_it(folder):
    covariances, expected, _ = alone(folder)
    search, calls = run_module.find_values, []

    def twice(*arguments):
        if len(calls) == 2:
            raise EngramError("values: cut off")
        calls.append(1)
        return search(*arguments)

    for cut in (True, False):
        own, editor = run_of(folder, "together", dist.group.WORLD)
        for layer, covariance in covariances.items():
            editor.use_covariance(layer, covariance)
        kept = {"layers": [1, 2], "method": "memit", "ridge": 0.1, "directory": folder / "run"}
        if not cut:
            editor.edit(many(), **kept)
            assert not changed(expected, own)
            continue
        run_module.find_values = twice
        try:
            with pytest.raises(EngramError, match="cut off"):
                editor.edit(many(), **kept)
        finally:
            run_module.find_values = search
        dist.barrier()
        assert len(list((folder / "run" / "values").iterdir())) >= 12


FAMILIES = ("llama", "qwen3", "gpt_neox", "phi3")


def tensor_parallel(folder, family):
    """A small model of a family divided among the ranks, and the same one whole."""
    saved, plain = folder / family, model_zoo.small_model(family)
    if not saved.exists():
        save_model(plain, model_zoo.byte_level_tokenizer(), saved)
    return load_model(saved, tp_plan="auto")[0], plain


def gathered(network):
    """The whole tensors of a divided model, by name."""
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
        for name, tensor in network.state_dict().items()
    }


def parts(network):
    return {name: local(tensor).clone() for name, tensor in network.state_dict().items()}


def equal(one, other):
    return [name for name in one if not torch.equal(one[name], other[name])] == []


@case
def tensor_parallel_edits_are_those_of_one_device(folder):
    for family in FAMILIES:
        divided, plain = tensor_parallel(folder, family)
        assert isinstance(divided.get_submodule(output_projection(plain, 1).name).weight, DTensor)
        before, whole = parts(divided), weights(plain)
        own = small_editor(model=plain, value=FEW, contexts=((4, 1),), cache_dir=folder / "whole")
        editor = small_editor(model=divided, value=FEW, contexts=((4, 1),), cache_dir=folder / "parts")
        for layers, method in ((1, "rome"), ([1, 2], "memit")):
            edits = [EDIT] if method == "rome" else many()[:6]
            # One covariance: an edit magnifies what a sum in another order changes of it.
            for layer, covariance in own.covariances([1, 2]).items():
                editor.use_covariance(layer, covariance)
            expected = own.edit(edits, layers=layers, method=method)
            result = editor.edit(edits, layers=layers, method=method)
            assert same_everywhere(str([module.edited_checksum for module in result.edited_modules]))
            made = gathered(divided)
            for module in result.modules:
                change = made[f"{module}.weight"] - whole[f"{module}.weight"]
                truth = plain.state_dict()[f"{module}.weight"] - whole[f"{module}.weight"]
                assert (change - truth).abs().max() <= 2e-6 < truth.abs().max(), (family, method)
            result.save_pretrained(folder / f"{family} {method}")
            result.revert()
            assert equal(before, parts(divided))
            expected.revert()
            saved = EditResult.from_pretrained(folder / f"{family} {method}")
            with saved.apply(divided):
                assert equal(made, gathered(divided))
            assert equal(before, parts(divided))
            with EditResult.from_pretrained(folder / f"{family} {method}").apply(plain):
                assert equal({name: made[name] for name in whole}, weights(plain))


@case
def tensor_parallel_covariances_are_those_of_one_device(folder):
    divided, plain = tensor_parallel(folder, "llama")
    moments = []
    for name, network in (("parts 2", divided), ("whole 2", plain)):
        editor = small_editor(model=network, cache_dir=folder / name, tokens=500)
        editor.covariance(1)
        (path,) = (folder / name / "moments").glob("*.safetensors")
        moments.append((path.name, load_file(path)["moment"]))
    (mine, found), (theirs, expected) = moments
    assert mine == theirs and (found - expected).norm() <= 1e-6 * expected.norm()


@case
def a_cache_of_one_part_alone_is_no_trap(folder):
    divided, _ = tensor_parallel(folder, "llama")
    for lucky in (0, 1):
        name = "parts 2" if dist.get_rank() == lucky else f"nothing {lucky} {dist.get_rank()}"
        editor = small_editor(model=divided, cache_dir=folder / name, tokens=500)
        assert same_everywhere(tensor_checksum(editor.covariance(1).inverse()))


@case
def a_run_of_parts_goes_on_from_a_journal(folder):
    divided, _ = tensor_parallel(folder, "llama")
    made = []
    for _ in range(2):
        editor = small_editor(model=divided, value=FEW, contexts=((4, 1),), cache_dir=folder / "parts")
        with editor.edit(many()[:6], layers=[1, 2], method="memit", directory=folder / "journal") as result:
            made.append([module.edited_checksum for module in result.edited_modules])
        # Each rank has lost something else.
        kind = "values" if dist.get_rank() else "writes"
        dist.barrier()
        next((folder / "journal" / kind).glob("*.safetensors")).unlink()
        dist.barrier()
    assert made[0] == made[1] and same_everywhere(str(made))


@case
def operators_take_tensors_in_parts(folder):
    mesh, generator = init_device_mesh("cpu", (2,)), torch.Generator().manual_seed(0)
    weight, left, right = (torch.randn(shape, generator=generator) for shape in ((6, 8), (6, 3), (3, 8)))
    for placement in (Shard(0), Shard(1), Replicate()):
        part = distribute_tensor(weight.clone(), mesh, [placement])
        factors = [distribute_tensor(factor, mesh, [Replicate()]) for factor in (left, right)]
        whole = part.full_tensor()
        ek.apply_low_rank_(part, *factors, 0.5)
        ek.apply_low_rank_(whole, left, right, 0.5)
        assert part.placements == (placement,) and torch.equal(part.full_tensor(), whole)

        tuned, logits = (torch.randn(6, 8, generator=generator) for _ in range(2))
        for base in (None, ek.pack_mask(weight > 0)):
            parts = [distribute_tensor(one.clone(), mesh, [placement]) for one in (weight, tuned, logits)]
            parts[2].requires_grad_()
            own = logits.clone().requires_grad_()
            given = None if base is None else distribute_tensor(base, mesh, [Replicate()])
            blended = ek.graft_blend(*parts, given, 1.0)
            truth = ek.graft_blend(weight, tuned, own, base, 1.0)
            assert torch.equal(blended.full_tensor(), truth)
            blended.square().sum().backward()
            truth.square().sum().backward()
            torch.testing.assert_close(parts[2].grad.full_tensor(), own.grad)


@case
def tensor_parallel_traces_are_those_of_one_device(folder):
    divided, plain = tensor_parallel(folder, "llama")
    tokenizer = model_zoo.byte_level_tokenizer()
    for kind in ("hidden", "mlp", "attention"):
        found, expected = (
            trace(network, tokenizer, EDIT.prompt, EDIT.subject, kind, samples=2)
            for network in (divided, plain)
        )
        torch.testing.assert_close(found.effects, expected.effects, rtol=1e-4, atol=1e-6)


@case
def tensor_parallel_models_are_saved_whole(folder):
    divided, plain = tensor_parallel(folder, "qwen3")
    save_model(divided, model_zoo.byte_level_tokenizer(), folder / "joined")
    assert not changed(weights(plain), load_model(folder / "joined")[0])
    # It still is what transformers takes for divided.
    assert divided.config.distributed_config is not None


def fully_sharded(after):
    """The small model divided by FSDP2, fresh or with a backward pass behind it."""
    own = copy.deepcopy(model())
    mesh = init_device_mesh("cpu", (2,))
    for layer in own.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(own, mesh=mesh)
    if after:
        ids = torch.tensor([[1, 2, 3, 4 + dist.get_rank()]])
        loss = own(input_ids=ids, labels=ids).loss
        if after == "a backward pass":
            loss.backward()
    return own


@case
def models_in_shards_take_edits_and_grafts(folder):
    result, made = edited(folder)
    graft = graft_of_two_layers()
    grafted = copy.deepcopy(model())
    graft.apply(grafted)
    for after in ("", "a forward pass", "a backward pass"):
        for change, expected in ((result, made), (graft, weights(grafted))):
            own = fully_sharded(after)
            applied = change.apply(own)
            assert equal(expected, {name: expected[name] for name in gathered(own)})
            assert equal(gathered(own), {name: expected[name] for name in gathered(own)})
            # Also where the passes between gathered them.
            ids = torch.tensor([[1, 2, 3]])
            whole = copy.deepcopy(model())
            whole.load_state_dict(expected)
            logits = own(input_ids=ids).logits
            torch.testing.assert_close(logits, whole(input_ids=ids).logits)
            applied.revert()
            assert equal(gathered(own), {name: weights(model())[name] for name in gathered(own)})


@case
def a_model_in_shards_of_which_one_is_whole_is_written_where_it_is_kept(folder):
    """Divided as one, its weights stay whole between a forward and a backward pass."""
    result, made = edited(folder)
    own = copy.deepcopy(model())
    fully_shard(own, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=False)
    ids = torch.tensor([[1, 2, 3]])
    own(input_ids=ids)
    with result.apply(own):
        assert equal(gathered(own), {name: made[name] for name in gathered(own)})
        own(input_ids=ids)
    assert equal(gathered(own), {name: weights(model())[name] for name in gathered(own)})


@case
def other_weights_in_shards_are_refused(folder):
    result, _ = edited(folder)
    own = fully_sharded("")
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(1)
    before = parts(own)
    for change in (result, graft_of_two_layers()):
        with pytest.raises(EngramError, match=r"^model: expected in .* the weights that the "):
            change.apply(own)
    assert equal(before, parts(own))


@case
def searches_in_shards_are_refused(folder):
    own = fully_sharded("")
    editor = small_editor(model=own, value=FEW, cache_dir=folder / "sharded")
    with pytest.raises(
        EngramError, match=r"^model: .* divided by FSDP2: make the edit on a model of that kind"
    ):
        editor.edit(EDIT, layers=1)
    with pytest.raises(EngramError, match=r"^model: .* divided by FSDP2"):
        editor.covariance(1)
    with pytest.raises(EngramError, match=r"^model: expected whole weights, got a part of "):
        localize(own, tuned(), list(batches()), sparsity=0.01, steps=5)


@cache
def graft_of_two_layers():
    """Half of the fine-tuned weights at some places of matrices, norms among them."""
    pre = {name: parameter.detach() for name, parameter in graftable_parameters(model()).items()}
    ft = {name: tuned().get_parameter(name).detach() for name in pre}
    generator = torch.Generator().manual_seed(2)
    masks = {name: torch.zeros(-(-weight.numel() // 8), dtype=torch.uint8) for name, weight in pre.items()}
    for name, mask in masks.items():
        if ".1." in name or ".3." in name:
            mask[torch.randperm(len(mask), generator=generator)[: 1 + len(mask) // 20]] = 5
    return Graft.from_masks(pre, ft, masks)


@cache
def tuned():
    """The model as it is after a fine-tuning."""
    own, generator = copy.deepcopy(model()), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return own


def batches():
    tokenizer = model_zoo.byte_level_tokenizer()
    for start in range(0, 12, 2):
        rows = [tokenizer(text)["input_ids"][:24] for text in model_zoo.TEXTS[start : start + 2]]
        ids = torch.tensor([row[: min(map(len, rows))] for row in rows])
        yield {"input_ids": ids, "labels": ids}


@case
def a_graft_of_two_ranks_is_that_of_one(folder):
    options = {"sparsity": 0.01, "steps": 10}
    alone = localize(model(), tuned(), list(batches()), accumulate=2, **options)
    for given in (model(), torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model()))):
        found = localize(given, tuned(), list(batches()), group=dist.group.WORLD, **options)
        assert found.overlap(alone).shared == alone.size == found.size == 371
        for step in ("first_loss", "last_loss"):
            assert found.metrics[step] == pytest.approx(alone.metrics[step], rel=1e-6)
        assert same_everywhere(str(found.metrics))
    with pytest.raises(EngramError, match=r"^model: .*DistributedDataParallel.* give the group"):
        localize(given, tuned(), list(batches()), **options)
    with pytest.raises(ValueError, match=r"^accumulate: expected a multiple of the 2 ranks, got 3$"):
        localize(model(), tuned(), list(batches()), accumulate=3, group=dist.group.WORLD, **options)


@case
def a_rank_whose_loss_is_not_finite_is_heard_by_the_other(folder):
    def loss_of(network, batch):
        return network(**batch).loss * (math.nan if dist.get_rank() == 1 else 1.0)

    own = copy.deepcopy(model())
    with pytest.raises(EngramError, match=r"^loss_fn: expected a finite loss, got nan$"):
        localize(own, tuned(), list(batches()), loss_of, 0.01, steps=5, group=dist.group.WORLD)
    assert not changed(weights(model()), own)


@case
def a_rank_that_ends_leaves_the_other_a_sentence(folder):
    """The last one: from here on there is one rank."""
    own, editor = run_of(folder, "together", dist.group.WORLD)
    if dist.get_rank() == 1:
        report(folder, a_rank_that_ends_leaves_the_other_a_sentence, "")
        os._exit(0)
    with pytest.raises(EngramError, match=r"^group: expected all its ranks to the end, got one lost"):
        editor.edit(EDIT, layers=1)
    assert not changed(weights(model()), own)


def report(folder: Path, one, outcome: str) -> None:
    (folder / f"{one.__name__} {dist.get_rank()}.json").write_text(json.dumps(outcome))


def main(folder: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder / 'ranks'}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for one in CASES:
        try:
            one(folder)
            outcome = ""
        except BaseException:
            outcome = traceback.format_exc()
        report(folder, one, outcome)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
