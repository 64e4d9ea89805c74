"""Processes that change one memory at once, some of them killed: nothing reported is lost or comes back."""

import memory_stress
import pytest
import torch

from engram_kernels.memory import EpisodicMemory

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(memory_stress, "SLOTS", 12)
    monkeypatch.setattr(memory_stress, "LATENT", 16)


def test_what_processes_report_is_what_is_there(tmp_path, small):
    (tmp_path / "journals").mkdir()
    place = tmp_path / "memory"
    # There beforehand: on a busy machine no process may live for long enough to make one.
    with EpisodicMemory.open(place, new=memory_stress.new_memory):
        pass
    outcome = memory_stress.stress(place, tmp_path / "journals", 4, 4, seed=0, patience=0.01)
    assert outcome.faults == []
    assert min(outcome.done.values()) > 5 and set(outcome.done) == {"ask", "write", "forget"}


def test_the_check_sees_what_is_lost_and_what_comes_back(tmp_path, small):
    folder, journal = tmp_path / "memory", memory_stress.Journal(tmp_path / "journal")
    latents = torch.cat([memory_stress.latent(name) for name in ("back", "stray")])
    with EpisodicMemory.open(folder, new=memory_stress.new_memory) as memory:
        memory.write(latents, ids=["back", "stray"])
    journal.say(say="end", write=["lost", "back"], forget=[], seconds=0.1)
    journal.say(say="end", write=[], forget=["back"], seconds=0.1)
    journal.say(say="begin", write=["stray", "missing"], forget=[])
    (folder / "left").touch()
    outcome = memory_stress.Outcome()
    memory_stress.check(folder, [journal], outcome)
    expected = (
        "half of a change",
        "1 reported writes are not",
        "2 facts are there",
        "files were left",
        "bytes of 1",
    )
    for fault in expected:
        assert sum(found.startswith(fault) for found in outcome.faults) == 1, outcome.faults
