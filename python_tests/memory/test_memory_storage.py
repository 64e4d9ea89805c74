"""One writer at a time, the old state or the new one at every moment, nothing left of what was forgotten."""

import os
import shutil
import threading

import pytest
import torch
from memory_helpers import C, filled, latents

import engram_kernels as ek
from engram_kernels._hashing import tensor_bytes
from engram_kernels.memory import EpisodicMemory, storage

pytestmark = pytest.mark.usefixtures("one_thread")

SOUND = {"README.md", storage.FILE, storage.LOCK}


@pytest.fixture
def folder(tmp_path):
    """A folder with the facts a to f, opened once before."""
    with EpisodicMemory.open(tmp_path / "m", new=filled):
        pass
    return tmp_path / "m"


def holds(folder, latent):
    """Whether any file below a folder has the bytes of a latent."""
    bits = bytes(tensor_bytes(latent))
    return any(bits in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_what_a_block_changes_is_saved(folder):
    gone = latents(6, C)[1]
    assert holds(folder, gone) and names(folder) == SOUND
    with open(folder / storage.FILE, "rb") as old:
        with EpisodicMemory.open(folder) as memory:
            memory.forget(ids=["b"])
            assert EpisodicMemory.from_pretrained(folder).ids == list("abcdef")
        assert EpisodicMemory.from_pretrained(folder).ids == list("acdef")
        # The old file has no name any more; what lies on the disk is seen by whoever still has it open.
        content = old.read()
    assert not holds(folder, gone) and names(folder) == SOUND
    assert len(content) > 8 * C and not any(content)


def test_a_block_that_raises_changes_nothing(folder):
    before = (folder / storage.FILE).read_bytes()
    with pytest.raises(ek.EngramError, match="x"), EpisodicMemory.open(folder) as memory:
        memory.forget(ids=["a"])
        memory.forget(ids=["x"])
    assert (folder / storage.FILE).read_bytes() == before and names(folder) == SOUND


def test_a_memory_may_be_saved_while_it_is_held(folder):
    with EpisodicMemory.open(folder) as memory:
        memory.forget(ids=["a"])
        memory.save_pretrained(folder, replace=True)
        memory.forget(ids=["b"])
    assert EpisodicMemory.from_pretrained(folder).ids == list("cdef")


def test_folders_that_cannot_be_opened(tmp_path, folder, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    (tmp_path / "file").touch()
    for name in ("none", "empty", "other", "file"):
        with pytest.raises(ek.EngramError, match=r"^directory: expected a saved memory, got .*no memory.saf"):
            with EpisodicMemory.open(tmp_path / name):
                pass
    for name in ("other", "file"):
        with pytest.raises(ek.EngramError, match=r"^directory: expected a saved memory"):
            with EpisodicMemory.open(tmp_path / name, new=filled):
                pass
    assert names(tmp_path) == {"m", "empty", "other", "file"} and names(tmp_path / "other") == {"x"}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "replace", full)
    with pytest.raises(ek.EngramError, match=r"^directory: expected one that can be written.*No space left"):
        with EpisodicMemory.open(folder) as memory:
            memory.forget(ids=["a"])
    monkeypatch.undo()
    assert EpisodicMemory.from_pretrained(folder).ids == list("abcdef") and names(folder) == SOUND


def test_an_error_of_the_blocks_own_is_not_the_folders(folder):
    with pytest.raises(FileNotFoundError), EpisodicMemory.open(folder):
        open(folder / "none")


def test_a_second_writer_waits_for_the_first(folder, monkeypatch):
    monkeypatch.setattr(storage, "PATIENCE", 0.05)
    refused = []

    def write():
        try:
            with EpisodicMemory.open(folder):
                pass
        except ek.EngramError as error:
            refused.append(str(error))

    with EpisodicMemory.open(folder):
        other = threading.Thread(target=write)
        other.start()
        other.join()
    (message,) = refused
    assert message.startswith("directory: expected") and message.endswith("another process that writes to it")


def crash(folder, change, calls):
    """Change a memory in another process, which dies at one call of the operating system; whether it died."""
    child = os.fork()
    if child == 0:
        left = calls

        def counted(function):
            def call(*arguments, **options):
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(9)
                return function(*arguments, **options)

            return call

        try:
            for name in ("fsync", "link", "replace", "open", "unlink"):
                setattr(os, name, counted(getattr(os, name)))
            with EpisodicMemory.open(folder, new=filled) as memory:
                change(memory)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_writer_that_is_killed_leaves_the_old_or_the_new(tmp_path, folder):
    gone, seen = latents(6, C)[0], set()
    for calls in range(1, 100):
        copy = tmp_path / str(calls)
        shutil.copytree(folder, copy)
        if not crash(copy, lambda memory: memory.forget(ids=["a"]), calls):
            break
        now = "".join(EpisodicMemory.from_pretrained(copy).ids)
        seen.add(now)
        with EpisodicMemory.open(copy) as memory:
            assert "".join(memory.ids) == now
        assert names(copy) == SOUND and holds(copy, gone) == (now == "abcdef")
        if now == "abcdef":  # The same change again, after what the first attempt left.
            with EpisodicMemory.open(copy) as memory:
                memory.forget(ids=["a"])
            assert not holds(copy, gone)
    assert seen == {"abcdef", "bcdef"} and 10 < calls < 99
    assert EpisodicMemory.from_pretrained(copy).ids == list("bcdef")


def test_a_new_memory_whose_writer_is_killed_is_new_or_there(tmp_path):
    seen = set()
    for calls in range(1, 100):
        place = tmp_path / str(calls)
        if not crash(place, lambda memory: None, calls):
            break
        seen.add((place / storage.FILE).exists())
        with EpisodicMemory.open(place, new=filled) as memory:
            assert memory.ids == list("abcdef")
        assert names(place) == SOUND
    assert seen == {False, True}


def test_links_are_not_followed_when_old_bytes_are_overwritten(tmp_path, folder):
    """A snapshot of the Hub is links into a cache, and a folder may be a stranger's."""
    mine = tmp_path / "mine"
    shutil.move(folder / storage.FILE, mine)
    (folder / storage.FILE).symlink_to(mine)
    (folder / storage.OLD).symlink_to(mine)
    (folder / storage.NEW).hardlink_to(mine)
    before = mine.read_bytes()
    with EpisodicMemory.open(folder) as memory:
        memory.forget(ids=["a"])
    assert mine.read_bytes() == before and names(folder) == SOUND
    assert EpisodicMemory.from_pretrained(folder).ids == list("bcdef")


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(folder, monkeypatch):
    other = filled()
    other.forget(ids=["a"])
    reads = []

    def torn(content):
        reads.append(len(content))
        if len(reads) == 1:
            other.save_pretrained(folder, replace=True)
            content = bytes(len(content))
        return parse(content)

    parse = ek.memory.files._parsed
    monkeypatch.setattr("engram_kernels.memory.files._parsed", torn)
    memory = EpisodicMemory.from_pretrained(folder)
    assert len(reads) == 2 and memory.ids == list("bcdef") and torch.equal(memory.gram, other.gram)
