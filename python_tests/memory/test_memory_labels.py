"""Memories by name, one more of them, and more slots."""

import pytest
import torch
from memory_helpers import C, K, apart, assert_unchanged, filled, frozen, latents

import engram_kernels as ek
from engram_kernels.memory import EpisodicMemory, state

pytestmark = pytest.mark.usefixtures("one_thread")


def test_memories_are_found_by_label(tmp_path):
    memory = EpisodicMemory(K, C, batch=2, labels=["ann", None])
    memory.write(latents(3, C), ids=range(3), memory="ann")
    assert memory.count.tolist() == [3, 0]
    assert memory.add_memory("bob") == 2 and memory.labels == ["ann", None, "bob"]
    memory.write(latents(2, C, seed=1), ids=[3, 4], memory="bob")
    alone = EpisodicMemory(K, C)
    alone.write(latents(2, C, seed=1), ids=[3, 4])
    queries = latents(4, C, seed=2)
    assert apart(memory.read(queries, memory="bob"), alone.read(queries)) < 1e-12
    assert apart(memory.leverage(queries, memory="bob"), alone.leverage(queries)) < 1e-12
    found, expected = memory.recall(queries, memory="bob"), alone.recall(queries)
    assert [[fact.name for fact in row] for row in found] == [[fact.name for fact in row] for row in expected]
    assert memory.threshold(memory="bob") == alone.threshold()
    memory.save_pretrained(tmp_path / "m")
    other = EpisodicMemory.from_pretrained(tmp_path / "m")
    assert_unchanged(other, frozen(memory))
    assert other.labels == memory.labels and other.batch == 3
    memory.forget(queries[:0], memory="bob")
    with pytest.raises(
        ValueError, match=r"^memory: expected a number or one of the labels \('ann', 'bob'\), g"
    ):
        memory.read(queries, memory="eve")


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (["a"], ValueError, "labels: expected 2, one for each memory, got 1"),
        (["a", "a"], ValueError, "labels: expected different ones"),
        (["a", 1], TypeError, "labels: expected texts or None, got int"),
        (["a", "\udcff"], ValueError, "labels: expected whole characters"),
    ],
)
def test_bad_labels(labels, error, message):
    with pytest.raises(error, match=rf"^{message}"):
        EpisodicMemory(K, C, batch=2, labels=labels)
    memory = EpisodicMemory(K, C, labels=["a"])
    with pytest.raises(ValueError, match=r"^labels: expected different ones"):
        memory.add_memory("a")
    assert memory.batch == 1 and memory.labels == ["a"]


@pytest.mark.parametrize("ridge", [0.1, "loo"])
def test_growing_is_writing_everything_anew(ridge):
    memory, keys, values = EpisodicMemory(4, C, batch=2, ridge=ridge), latents(7, C), latents(7, C, seed=1)
    memory.write(values[:3], keys[:3], ids=["long", "b"], parts=[2, 1], memory=1)
    memory.write(values[3:5], ids=["c", "d"], texts=["C", "D"], memory=0)
    memory.write(values[5:], ids=["gone", "e"], memory=1)
    memory.forget(ids=["gone"])
    ids, before = memory.ids, frozen(memory)
    for slots, error in ((0, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match=r"^slots: expected"):
            memory.grow(slots)
        assert_unchanged(memory, before)
    memory.matrix()
    grown = memory.grow(K, seed=3)
    assert grown is memory and memory.slots == K
    anew = EpisodicMemory(K, C, batch=2, ridge=ridge, seed=3)
    anew.write(values[3:5], ids=[0, 1], memory=0)
    anew.write(
        torch.cat([values[:3], values[6:]]), torch.cat([keys[:3], values[6:]]), ids=range(2, 6), memory=1
    )
    assert grown.ids == ids and grown.ledger["c"].text == "C" and grown.ridge == ridge
    assert grown.count.tolist() == [2, 4] and grown.keyed.tolist() == anew.keyed.tolist()
    assert apart(grown.gram, anew.gram) < 1e-12 and apart(grown.matrix(), anew.matrix()) < 1e-9
    grown.forget(ids=grown.ids)
    assert not grown.gram.any()


def test_rows_without_ids_do_not_grow():
    memory = filled()
    memory.write(latents(2, C, seed=1))
    with pytest.raises(
        ek.EngramError, match=r"^slots: expected a memory whose rows all have ids, got 2 without"
    ):
        memory.grow(2 * K)


def test_a_ridge_is_chosen_anew_only_where_something_changed(monkeypatch, tmp_path):
    chosen = []

    def counted(gram, *rows):
        chosen.append(len(rows[1]))
        return choose(gram, *rows)

    choose = state.choose_ridge
    monkeypatch.setattr(state, "choose_ridge", counted)
    memory = EpisodicMemory(K, C, batch=3, ridge="loo")
    memory.write(latents(3, 4, C), ids=range(12))
    memory.matrix()
    assert chosen == [4, 4, 4]
    memory.write(latents(1, C, seed=1), ids=["x"], memory=1)
    memory.leverage(latents(1, C), memory=0)
    memory.matrix()
    assert chosen[3:] == [5]
    memory.forget(ids=[8])
    memory.overwrite([0], latents(1, C, seed=2) * 0)
    memory.condition()
    assert chosen[4:] == [4, 3]
    memory.save_pretrained(tmp_path / "m")
    other = EpisodicMemory.from_pretrained(tmp_path / "m")
    other.matrix()
    assert len(chosen) == 6 and torch.equal(other.ridges, memory.ridges)
    other.write(latents(1, C, seed=3), ids=["y"], memory=2)
    other.matrix()
    assert chosen[6:] == [4]
