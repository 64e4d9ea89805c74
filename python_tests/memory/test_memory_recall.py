"""Which facts a query is about, and from which score on the memory is taken to know."""

import pytest
import torch
from memory_helpers import C, K, latents

from engram_kernels.memory import EpisodicMemory
from engram_kernels.memory import recall as recalling

pytestmark = pytest.mark.usefixtures("one_thread")


def cosines(queries, keys):
    return torch.cosine_similarity(queries[:, None], keys[None], dim=-1)


def test_facts_are_ranked_by_their_nearest_key():
    memory, keys, values = EpisodicMemory(K, C), latents(7, C), latents(7, C, seed=1)
    memory.write(values, keys, ids=["a", "long", "b", "c"], texts=list("ABCD"), parts=[1, 3, 2, 1])
    queries = latents(5, C, seed=2)
    expected = [part.amax(-1) for part in cosines(queries, keys).split([1, 3, 2, 1], dim=-1)]
    expected = torch.stack(expected, dim=-1)
    for found, scores in zip(memory.recall(queries, top=3), expected, strict=True):
        order = scores.argsort(descending=True)[:3].tolist()
        assert [fact.name for fact in found] == [["a", "long", "b", "c"][i] for i in order]
        torch.testing.assert_close(
            torch.tensor([fact.score for fact in found], dtype=torch.float64),
            scores[order],
            rtol=0,
            atol=1e-6,
        )
        assert all(fact.entry is memory.ledger[fact.name] for fact in found)
        assert [fact.known for fact in found] == [fact.score >= memory.threshold() for fact in found]
    assert memory.recall(keys[2:3])[0][0].known
    only = memory.recall(queries, where=lambda name, entry: entry.text == "C")
    assert [[fact.name for fact in found] for found in only] == [["b"]] * 5


def test_a_default_device_of_the_caller_is_not_the_memory_s(tmp_path):
    memory, keys = EpisodicMemory(K, C), latents(4, C)
    with torch.device("meta"):
        memory.write(keys, ids=list("abcd"))
        memory.save_pretrained(tmp_path / "kept")
        read = EpisodicMemory.from_pretrained(tmp_path / "kept")
        assert [fact.name for (fact, *_) in read.recall(keys)] == list("abcd")


def test_what_is_recalled_is_shown_without_its_latents():
    memory, keys = EpisodicMemory(K, C), latents(2, C)
    memory.write(keys, ids=["a", "b"], texts=["The Louvre", None], metadata=[None, {"page": 3}])
    fact = memory.recall(keys)[0][0]._replace(score=1.0)
    assert (
        repr(fact) == "Recalled(name='a', entry=Entry('The Louvre', memory=0, rows=1), score=1.0, known=True)"
    )
    assert repr(memory.ledger["b"]) == "Entry(memory=0, rows=1, metadata={'page': 3})"


def test_of_equally_near_facts_the_newest_is_first():
    memory, keys = EpisodicMemory(K, C), latents(1, C)
    memory.write(latents(3, C, seed=1), keys.expand(3, -1), ids=["old", "middle", "new"])
    assert [fact.name for fact in memory.recall(keys)[0]] == ["new", "middle", "old"]


def test_each_memory_ranks_its_own_facts():
    memory = EpisodicMemory(K, C, batch=2)
    memory.write(latents(2, 3, C), ids=range(6))
    assert {fact.name for fact in memory.recall(latents(1, C), memory=1)[0]} == {3, 4, 5}
    with pytest.raises(ValueError, match=r"^memory: expected a number, as there are 2 memories, got None"):
        memory.recall(latents(1, C))
    with pytest.raises(ValueError, match=r"^memory: expected from 0 to 1, got 2"):
        memory.threshold(memory=2)
    with pytest.raises(ValueError, match=r"^top: expected at least 1"):
        memory.recall(latents(1, C), top=0, memory=0)
    with pytest.raises(ValueError, match=r"^queries: expected shape \[N, C\]"):
        memory.recall(latents(2, 1, C), memory=0)
    assert EpisodicMemory(K, C).recall(latents(2, C)) == [[], []]


def test_the_threshold_leaves_out_each_fact_with_all_of_its_rows():
    memory, keys = EpisodicMemory(K, C), latents(9, C)
    absent = 0.24
    assert memory.threshold() == pytest.approx(absent + (1 - absent) / 4)
    memory.write(keys[:3], ids=["alone"], parts=[3])
    assert memory.threshold() == pytest.approx(absent + (1 - absent) / 4)
    # Another fact about a key that is there is no other key.
    memory.write(keys[3:], ids=["x", "long", "y"], parts=[1, 4, 1])
    memory.write(latents(1, C, seed=3), keys[3:4], ids=["against x"])
    owners = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3])
    others = cosines(keys, keys).masked_fill(owners[:, None] == owners, -1).amax(-1)
    absent = (others.sum() + others[3] + 8 * 0.24) / 18
    assert memory.threshold() == pytest.approx(float(absent + (1 - absent) / 4), abs=1e-6)


def test_a_fact_of_several_rows_is_one_fact(tmp_path):
    memory, never, rows = EpisodicMemory(K, C, batch=2), EpisodicMemory(K, C, batch=2), latents(2, 4, C)
    about = [{"tags": ["x"], "n": 1}, None, {}]
    memory.write(rows, ids=["long", "one", "all"], parts=[3, 1, 4], metadata=about)
    never.write(rows[0, 3:], ids=["one"], memory=0)
    about[0]["tags"].append("y")
    assert memory.ledger["long"].metadata == {"tags": ["x"], "n": 1}
    memory.save_pretrained(tmp_path / "m")
    memory = EpisodicMemory.from_pretrained(tmp_path / "m")
    assert torch.equal(memory.ledger["long"].value, rows[0, :3])
    assert [memory.ledger[name].metadata for name in memory.ids] == [{"tags": ["x"], "n": 1}, None, {}]
    memory.overwrite(["all", "long"], latents(7, C, seed=3))
    assert torch.equal(memory.ledger["all"].value, latents(7, C, seed=3)[:4])
    memory.overwrite(["long", "all"], torch.cat([rows[0, :3], rows[1]]))
    memory.forget(ids=["all", "long"])
    assert memory.count.tolist() == [1, 0]
    torch.testing.assert_close(memory.matrix(), never.matrix(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"parts": [4, 2]}, ValueError, "parts: expected facts that lie in one memory each"),
        ({"parts": [3, 2]}, ValueError, "parts: expected numbers whose sum is 6"),
        ({"parts": [3, 0, 3]}, ValueError, "parts: expected at least 1"),
        ({"parts": [3, 3], "ids": ["a"]}, ValueError, "ids: expected 2, one for each row"),
        ({"metadata": [{}]}, ValueError, "metadata: expected 6, one for each id"),
        ({"metadata": ["x"] * 6}, TypeError, "metadata: expected mappings or None"),
        ({"metadata": [{"x": {1}}] * 6}, TypeError, "metadata: expected what JSON can hold"),
        ({"metadata": [{"x": float("nan")}] * 6}, TypeError, "metadata: expected what JSON can hold"),
        ({"metadata": [{}] * 6, "ids": None}, ValueError, "metadata: expected ids with them"),
        # Bytes that are no UTF-8 come so from a command line, and no file would take them.
        ({"ids": [*"abcde", "\udcff"]}, ValueError, "ids: expected whole characters"),
        ({"texts": [None, "\udcff", *"abcd"]}, ValueError, "texts: expected whole characters"),
        ({"metadata": [{"x": ["\udcff"]}] * 6}, ValueError, "metadata: expected whole characters"),
    ],
)
def test_bad_facts_change_nothing(arguments, error, message):
    memory = EpisodicMemory(K, C, batch=2)
    with pytest.raises(error, match=rf"^{message}"):
        memory.write(latents(2, 3, C), **{"ids": range(6), **arguments})
    assert len(memory) == len(memory.ledger) == 0 and not memory.gram.any()


def test_the_threshold_is_computed_once_until_something_changes(monkeypatch):
    memory, calls = EpisodicMemory(K, C), []

    def counted(*arguments):
        calls.append(arguments)
        return others(*arguments)

    others = recalling._nearest_others
    monkeypatch.setattr(recalling, "_nearest_others", counted)
    memory.write(latents(4, C), ids=range(4))
    first = memory.threshold()
    assert memory.recall(latents(2, C))[0] and memory.threshold() == first and len(calls) == 1
    memory.forget(ids=[0])
    changed = memory.threshold()
    memory.write(latents(1, C), ids=[0])
    assert changed != first and memory.threshold() == pytest.approx(first) and len(calls) == 3


def test_scores_are_fp32_where_autocast_is_on():
    memory, queries = EpisodicMemory(K, C), latents(3, C, seed=1)
    memory.write(latents(7, C), ids=range(7))
    expected = memory.recall(queries), memory.threshold()
    memory.forget(ids=[6])
    memory.write(latents(7, C)[6:], ids=[6])
    with torch.autocast("cpu", torch.bfloat16):
        found = memory.recall(queries), memory.threshold()
    assert found[1] == expected[1]
    assert [[fact.score for fact in facts] for facts in found[0]] == [
        [fact.score for fact in facts] for facts in expected[0]
    ]
