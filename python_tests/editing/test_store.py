"""A store of edits: calls that go on where others ended, exact removal, cuts at any moment, two writers."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

pytest.importorskip("transformers")

import model_zoo
import torch
from accuracy import error
from editing_helpers import changed, weights
from mutations import flip

from engram_kernels import _io
from engram_kernels.editing import METHODS, Edit, EditResult, EditStore
from engram_kernels.editing.saving import journal
from engram_kernels.editing.saving.compression import compressed
from engram_kernels.editing.search.values import ValueOptions
from engram_kernels.editing.statistics import statistics as statistics_module
from engram_kernels.errors import EngramError

EDITS = [Edit(f"Tower {letter}", "{} is located in the city of", "Rome") for letter in "abcdefgh"]
OPTIONS = {
    "corpus": model_zoo.TEXTS,
    "contexts": ((4, 2),),
    "ridge": 0.01,
    "value": ValueOptions(steps=3, learning_rate=0.02, weight_decay=0.0),
}
JOINT = replace(METHODS["engram"], ridge=0.5, preserve=True)

pytestmark = pytest.mark.filterwarnings("ignore:.*did not take:UserWarning")


def open_store(folder, model=None, **options):
    model = model or model_zoo.small_model("llama")
    return EditStore(folder, model, model_zoo.byte_level_tokenizer(), **{**OPTIONS, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method",
    [
        None,
        "rome",
        replace(METHODS["memit"], layers=2, batch=1, preserve=True),
        replace(METHODS["natural"], layers=2, batch=1),
        replace(METHODS["ultraedit"], layers=2, batch=1),
    ],
)
def test_many_calls_are_one_call_bit_for_bit(tmp_path, method, dtype):
    """Each of the calls in a store that was opened anew, as other processes do, on a model loaded anew."""
    together = open_store(tmp_path / "one", model_zoo.small_model("llama", dtype=dtype), method=method)
    together.add(EDITS[:5])
    expected = weights(together.model)
    assert changed(expected, model_zoo.small_model("llama", dtype=dtype)) != []
    for edit in EDITS[:5]:
        apart = open_store(tmp_path / "many", model_zoo.small_model("llama", dtype=dtype), method=method)
        apart.add(edit)
        final = weights(apart.model)
        apart.revert()
        assert changed(weights(model_zoo.small_model("llama", dtype=dtype)), apart.model) == []
    assert all(torch.equal(expected[name], final[name]) for name in expected)
    assert [stored.edit for stored in apart] == EDITS[:5] and len(apart) == 5
    rebuilt = model_zoo.small_model("llama", dtype=dtype)
    apart.result().apply(rebuilt)
    assert changed(expected, rebuilt) == []
    with open_store(tmp_path / "many", model_zoo.small_model("llama", dtype=dtype)) as again:
        assert again.verify() == 5 and changed(expected, again.model) == []
    assert changed(expected, again.model) != []


@pytest.fixture
def passes(monkeypatch):
    """An entry for each pass over the corpus."""
    found, whole = [], statistics_module.second_moments

    def counting(*arguments, **named):
        found.append(1)
        return whole(*arguments, **named)

    monkeypatch.setattr(statistics_module, "second_moments", counting)
    return found


@pytest.mark.slow
def test_sixty_calls_of_one_are_one_call_of_sixty(tmp_path, passes):
    """The same bits, one pass over the corpus, one moment file a layer."""
    edits = [Edit(f"Tower {number}", "{} is located in the city of", "Rome") for number in range(60)]
    options = {
        "method": replace(METHODS["memit"], layers=2, batch=1, preserve=True),
        "contexts": (),
    }
    with open_store(tmp_path / "one", **options) as together:
        together.add(edits)
        expected = weights(together.model)
    assert len(passes) == 1
    for edit in edits:
        with open_store(tmp_path / "many", **options) as apart:
            apart.add(edit)
            final = weights(apart.model)
    assert all(torch.equal(expected[name], final[name]) for name in expected)
    assert changed(expected, model_zoo.small_model("llama")) != []
    assert len(passes) == 2 and len(apart) == 60
    assert len(list((tmp_path / "many" / "statistics").rglob("*.safetensors"))) == 2


def test_one_corpus_pass_and_one_moment_file_a_layer(tmp_path, passes):
    method = replace(METHODS["memit"], layers=2, preserve=True)
    for edit in EDITS[:3]:
        store = open_store(tmp_path, method=method)
        store.add(edit)
        # What says nothing about the keys asks for no new statistics.
        store.revert()
    other = model_zoo.small_model("llama")
    other.config.use_cache = not other.config.use_cache
    other.config.architectures = ["Another"]
    with open_store(tmp_path, other) as store:
        store.add(EDITS[3])
    assert len(passes) == 1
    assert len(list((tmp_path / "statistics").rglob("*.safetensors"))) == 2


def test_remove_is_as_if_never_made(tmp_path):
    """Of the values as they were found: what is written is the ridge solution of the others."""
    store = open_store(tmp_path / "store", method=JOINT, layers=1)
    store.add(EDITS[:3])
    store.add(EDITS[3:6])
    before = weights(store.model)
    (module,) = store.result().modules
    covariance = torch.linalg.inv(store._editor.covariance(store.layers[0]).inverse())
    base = model_zoo.small_model("llama").get_submodule(module).weight.detach().double()
    # The least-squares problem that the stream solves, by its own definition.
    keys, targets, weight = [], [], base.clone()
    for write in store.result().writes:
        key = write.keys.double()
        keys.append(key)
        targets.append(key @ weight.T + write.residuals.double())
        weight = weight + write.left.double() @ write.right.double()
    keys, targets = torch.cat(keys), torch.cat(targets)

    def solution(rows):
        system = 0.5 * covariance + keys[rows].T @ keys[rows]
        return base + torch.linalg.solve(system, keys[rows].T @ (targets[rows] - keys[rows] @ base.T)).T

    everything = store.model.get_submodule(module).weight.double()
    torch.testing.assert_close(everything - base, solution(list(range(6))) - base, rtol=1e-4, atol=1e-6)
    store.remove(3)
    others = [0, 1, 3, 4, 5]
    left = store.model.get_submodule(module).weight.double()
    torch.testing.assert_close(left - base, solution(others) - base, rtol=1e-4, atol=1e-6)
    assert [stored.id for stored in store] == [1, 2, 4, 5, 6]
    assert changed(before, store.model) and store.verify() == 5
    # And again, out of what is one write by now; a later edit goes on from there.
    store.remove(1)
    left = store.model.get_submodule(module).weight.double()
    torch.testing.assert_close(left - base, solution([1, 3, 4, 5]) - base, rtol=1e-4, atol=1e-6)
    (added,) = store.add(EDITS[6])
    assert added.id == 7 and store[7].edit == EDITS[6] and store.verify() == 5
    for number in (2, 4, 5, 6, 7):
        store.remove(number)
    assert changed(weights(model_zoo.small_model("llama")), store.model) == [] and len(store) == 0
    assert store.add(EDITS[7])[0].id == 8


def test_remove_of_a_method_that_forgets_leaves_its_write_out(tmp_path):
    store = open_store(tmp_path, method=METHODS["rome"])
    store.add(EDITS[:3])
    whole = store.result()
    store.remove(2)
    whole.remove(1)
    expected = model_zoo.small_model("llama")
    whole.apply(expected)
    assert changed(weights(expected), store.model) == []


def test_compact_and_export_keep_every_bit(tmp_path):
    store = open_store(tmp_path / "store")
    for edit in EDITS[:3]:
        store.add(edit)
    before = weights(store.model)
    store.compact()
    assert changed(before, store.model) == [] and store.verify() == 3
    assert len(list((tmp_path / "store" / "edits").iterdir())) == 1
    store.export(tmp_path / "adapter")
    other = model_zoo.small_model("llama")
    EditResult.from_pretrained(tmp_path / "adapter").apply(other)
    assert changed(before, other) == []
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (tmp_path / "adapter").iterdir()
    }


def test_export_of_a_smaller_rank(tmp_path):
    """The adapter of that rank that changes the answers to the edits' keys most alike."""
    from safetensors.torch import load_file

    with open_store(tmp_path / "kept", layers=1) as store:
        store.add(EDITS[:5])
        result = store.result()
        left, right = result.factors(result.modules[0])
        keys = torch.cat([write.keys for write in result.writes]).double()
        lost = store.export(tmp_path / "narrow", rank=2)
        assert store.export(tmp_path / "whole") == dict.fromkeys(lost, 0.0)
    changes = (left.double() @ right.double()) @ keys.T
    values = torch.linalg.svdvals(changes)
    tensors = load_file(tmp_path / "narrow" / "adapter_model.safetensors")
    (narrow,) = [
        tensors[name].double() @ tensors[name.replace("lora_B", "lora_A")].double()
        for name in tensors
        if "lora_B" in name
    ]
    share = float(values[2:].norm() / values.norm())
    assert list(lost.values()) == [pytest.approx(share, rel=1e-9)] and 0 < share < 1
    assert float((changes - narrow @ keys.T).norm() / changes.norm()) == pytest.approx(share, rel=1e-5)
    assert torch.linalg.matrix_rank(narrow) == 2
    for rank, kind in ((0, ValueError), (True, TypeError), (2.0, TypeError)):
        with pytest.raises(kind, match="rank: expected"):
            store.export(tmp_path / "none", rank=rank)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("count", [3, 8, 40])
def test_compressed_without_keys_is_the_truncated_svd(count):
    left, right = torch.randn(12, count), torch.randn(count, 20)
    whole = left.double() @ right.double()
    vectors, values, others = torch.linalg.svd(whole, full_matrices=False)
    for rank in (1, 2, 12, 50):
        found, other, lost = compressed(left, right, rank)
        expected = (vectors[:, :rank] * values[:rank]) @ others[:rank]
        assert error(found.double() @ other.double(), expected) < 1e-6
        assert found.shape[1] <= min(rank, count, 12)
        assert lost == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-7)


def test_a_store_ends_on_its_health_and_goes_on(tmp_path):
    with open_store(tmp_path, method="rome") as store:
        store.add(EDITS[:2])
        growth = store.health[-1].growth
        with pytest.raises(EngramError, match="stop_on: the run ended after 0 edits"):
            store.add(EDITS[2:4], stop_on={"growth": growth / 2})
        assert len(store) == 2 and len(store.health) == 2
        store.add(EDITS[2:4], stop_on={"growth": 1e9})
        assert len(store) == 4 and [one.edits for one in store.health] == [1, 2, 3, 4]
    with pytest.raises(EngramError, match="values: expected the store's"):
        open_store(tmp_path, values="gradient")


def test_without_a_model_a_store_lists_and_exports(tmp_path):
    open_store(tmp_path / "store").add(EDITS[:2])
    store = EditStore(tmp_path / "store")
    assert [stored.edit.target for stored in store] == ["Rome", "Rome"] and store.verify() == 2
    store.export(tmp_path / "out")
    assert repr(store).startswith("EditStore(") and "edits=2" in repr(store)
    for call in (lambda: store.add(EDITS[2]), lambda: store.remove(1), store.compact):
        with pytest.raises(EngramError, match=r"^model: expected the base model to edit, got none"):
            call()
    with pytest.raises(KeyError):
        store[9]


def test_another_process_in_between(tmp_path):
    first, second = open_store(tmp_path), open_store(tmp_path)
    first.add(EDITS[0])
    second.add(EDITS[1])
    first.add(EDITS[2])
    assert [stored.edit for stored in first] == EDITS[:3]
    whole = open_store(tmp_path / "whole")
    whole.add(EDITS[:3])
    assert changed(weights(whole.model), first.model) == []


def test_two_writers_do_not_mix(tmp_path):
    """The second waits for the first, and adds to what it left."""
    stores = [open_store(tmp_path) for _ in range(2)]
    threads = [
        threading.Thread(target=store.add, args=([edit],)) for store, edit in zip(stores, EDITS, strict=False)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with open_store(tmp_path) as store:
        assert store.verify() == 2 and {stored.id for stored in store} == {1, 2}
    with stores[0]._folder.locked():
        with pytest.raises(EngramError, match=r"^directory: expected a store that no other process writes"):
            EditStore(tmp_path, timeout=0.1)


def test_what_fails_changes_nothing(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    store.add(EDITS[:2])
    before, files = weights(store.model), sorted(path.name for path in (tmp_path / "edits").iterdir())

    def full(*_arguments, **_named):
        raise OSError(28, "No space left on device")

    for name, call in (("add", lambda: store.add(EDITS[2])), ("remove", lambda: store.remove(1))):
        with monkeypatch.context() as patch:
            patch.setattr(EditResult, "save_pretrained", full)
            with pytest.raises(OSError):
                call()
        assert changed(before, store.model) == [], name
        assert sorted(path.name for path in (tmp_path / "edits").iterdir()) == files
        assert store.verify() == 2
    with pytest.raises(EngramError):
        store.add(Edit("Rome", "{}" + " is in" * 400, "Italy"))
    with pytest.raises(ValueError, match=r"^id: expected that of an edit of the store, got 7$"):
        store.remove(7)
    assert changed(before, store.model) == []


def test_bad_stores(tmp_path):
    open_store(tmp_path / "store").add(EDITS[0])
    with pytest.raises(
        EngramError, match=r"^model: expected the one of .*, without edits, got other weights"
    ):
        open_store(tmp_path / "store", model_zoo.small_model("gpt2"))
    with pytest.raises(EngramError, match=r"^method: expected the store's"):
        open_store(tmp_path / "store", method="memit")
    with pytest.raises(EngramError, match=r"^seed: expected the store's, 0, got 1$"):
        open_store(tmp_path / "store", seed=1)
    with pytest.raises(ValueError, match=r"^tokenizer: "):
        EditStore(tmp_path / "store", model_zoo.small_model("llama"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(EngramError, match=r"^directory: expected an empty one or a store's"):
        open_store(tmp_path / "other")
    (tmp_path / "store" / "store.json").write_text('{"format": 99}')
    with pytest.raises(EngramError, match=r"^directory: expected a store's store.json"):
        EditStore(tmp_path / "store")
    with pytest.raises(EngramError, match=r"^directory: expected a store, or a model to begin one"):
        EditStore(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(EngramError, match=r"^directory: expected a store with edits"):
        open_store(tmp_path / "empty").export(tmp_path / "out")


def test_spoilt_statistics_are_refused_by_name(tmp_path):
    open_store(tmp_path, layers=1).add(EDITS[0])
    (path,) = (tmp_path / "statistics").rglob("*.safetensors")
    flip(path, -1)
    model = model_zoo.small_model("llama")
    before = weights(model)
    kind = rf"^directory: expected the statistics as .*{path.name}.* its checksum is another\); without"
    for call in (lambda: open_store(tmp_path, model), lambda: EditStore(tmp_path).verify()):
        with pytest.raises(EngramError, match=kind):
            call()
    assert changed(before, model) == []
    path.unlink()
    with open_store(tmp_path, model) as store:
        store.add(EDITS[1])
    assert store.verify() == 2


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_name_is_the_method_one_edit_at_a_time(tmp_path, name):
    """The store's own is the one of that name; one by gradients keeps its batches."""
    with open_store(tmp_path / "named", method=name, layers=1) as store:
        method, given = store.method, METHODS[name]
    if given.values == "gradient":
        assert method == given
        return
    assert method.batch == 1 and method.ridge == (given.ridge or 1) and method.held > 0
    assert replace(method, batch=given.batch, ridge=given.ridge, preserve=given.preserve) == given
    with open_store(tmp_path / "named", method=name) as again:
        assert again.method == method
    if name == "engram":
        with open_store(tmp_path / "own", layers=1) as own:
            assert own.method == method
    with open_store(tmp_path / "settings", method=given, layers=1) as settings:
        assert settings.method == given


def test_statistics_are_read_once_a_call(tmp_path, monkeypatch):
    method = replace(METHODS["memit"], layers=2, batch=1, preserve=True)
    open_store(tmp_path, method=method).revert()
    sums, checksum = [], _io._tensors_checksum
    monkeypatch.setattr(
        _io,
        "_tensors_checksum",
        lambda tensors, about: sums.append("moment" in tensors) or checksum(tensors, about),
    )
    with open_store(tmp_path) as store:
        store.add(EDITS[0])
    assert sum(sums) == 2  # a file a layer


def test_a_run_that_another_version_began_is_refused_with_the_way_out(tmp_path, monkeypatch):
    def cut(stage, done, _total):
        if stage == "values" and done:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal, "FORMAT", journal.FORMAT - 1)
        with pytest.raises(KeyboardInterrupt):
            open_store(tmp_path, progress=cut).add(EDITS[0])
    (pending,) = (tmp_path / "pending").iterdir()
    with open_store(tmp_path) as store:
        with pytest.raises(EngramError, match=rf"same format, .* begins anew: rm -r {pending}$"):
            store.add(EDITS[0])
        shutil.rmtree(pending)
        store.add(EDITS[0])
        assert store.verify() == 1


# Each run is a fork of a process that has imported everything and computed nothing.
RUNS = """
import os, sys, warnings
sys.path[:0] = {paths!r}
warnings.simplefilter("ignore")
from test_store import EDITS, open_store

def run():
    store = open_store({folder!r})
    print("ready", os.getpid(), flush=True)
    while True:
        for stored in store.add(EDITS[len(store) % len(EDITS)]):
            print("added", stored.id, flush=True)
        if len(store) > 3:
            first = next(iter(store)).id
            store.remove(first)
            print("removed", first, flush=True)
        store.compact()

for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        run()
    os.waitpid(child, 0)
    print("dead", child, flush=True)
"""


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """kill -9 ten times: what was said to be done is there, whole, and nothing else but what was in hand."""
    here = os.path.dirname(__file__)
    paths = [here, os.path.join(here, "..", "helpers"), os.path.join(here, "..")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    moments, there, latest = random.Random(0), set(), 0
    code = RUNS.format(paths=paths, folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as runs:
        for _ in range(10):
            runs.stdin.write("\n")
            runs.stdin.flush()
            ready, process = runs.stdout.readline().split()
            assert ready == "ready"
            time.sleep(moments.random() * 2)
            os.kill(int(process), signal.SIGKILL)
            while (line := runs.stdout.readline().split())[0] != "dead":
                number = int(line[1])
                latest = max(latest, number)
                there = there | {number} if line[0] == "added" else there - {number}
            store = EditStore(tmp_path)
            assert store.verify() == len(store)
            found = {stored.id for stored in store}
            assert found in (there, there | {latest + 1}, there - {min(there, default=0)})
            there, latest = found, max(found | {latest})
        runs.stdin.close()
    assert latest > 1
    with open_store(tmp_path) as store:
        store.verify()
        before = weights(store.model)
        store.add(EDITS[0])
        assert changed(before, store.model) != [] and store.verify() == len(there) + 1
