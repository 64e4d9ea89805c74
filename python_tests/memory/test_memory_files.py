"""Folders that hold a memory to the bit, and those that are refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from memory_helpers import C, K, assert_unchanged, frozen, latents, mixed

import engram_kernels as ek
from engram_kernels._hashing import digest
from engram_kernels.memory import EpisodicMemory

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("state_dtype", [torch.float64, torch.float32])
def test_files_hold_a_memory_to_the_bit(tmp_path, state_dtype):
    memory = mixed(state_dtype=state_dtype)
    memory.matrix()
    memory.save_pretrained(str(tmp_path / "memory"))
    assert "é" in (tmp_path / "memory" / "config.json").read_text(encoding="utf-8")
    other = EpisodicMemory.from_pretrained(str(tmp_path / "memory"))
    for name, buffer in memory.named_buffers():
        assert torch.equal(other.get_buffer(name), buffer), name
    assert_unchanged(other, frozen(memory))
    assert other.ledger["é"].key is other.ledger["é"].value
    assert {other.ledger[name].value.dtype for name in other.ids} == {torch.bfloat16, torch.float32}
    for _, entry in other.ledger.items():
        assert entry.value.untyped_storage().nbytes() == 6 * entry.value.element_size()
    assert (other.ridge, other.encoder) == ("loo", "minilm")
    assert torch.equal(other.read(latents(2, 3, 6)), memory.read(latents(2, 3, 6)))
    other.forget(ids=other.ids)
    assert not other.gram.any()


def test_files_are_replaced_only_when_asked(tmp_path):
    memory, folder = mixed(), tmp_path / "memory"
    memory.save_pretrained(folder)
    with pytest.raises(ek.EngramError, match=r"^directory: expected a new or empty one"):
        memory.save_pretrained(folder)
    memory.forget(ids=[1])
    for _ in range(2):  # The second time, by a memory that is the same.
        memory.save_pretrained(folder, replace=True)
        assert EpisodicMemory.from_pretrained(folder).ids == memory.ids
        assert len(list(folder.glob("memory-*"))) == 1
    next(folder.glob("*.safetensors")).unlink()
    memory.forget(ids=[2])
    memory.save_pretrained(str(folder), replace=True)
    memory.save_pretrained(tmp_path / "new", replace=True)
    for saved in (folder, tmp_path / "new"):
        assert EpisodicMemory.from_pretrained(saved).ids == memory.ids
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(ek.EngramError, match=r"^directory: expected a saved memory"):
        memory.save_pretrained(tmp_path / "other", replace=True)
    assert (tmp_path / "other" / "config.json").read_text() == "{}"


def test_a_change_that_this_memory_has_not_seen_is_not_replaced(tmp_path):
    folder, ours, theirs = tmp_path / "memory", mixed(), latents(1, 6).float()
    ours.save_pretrained(folder)
    other = EpisodicMemory.from_pretrained(folder)
    other.write(theirs, ids=["theirs"], memory=0)
    other.save_pretrained(folder, replace=True)
    other.overwrite(["theirs"], theirs, texts=["only another text"])
    other.save_pretrained(str(folder), replace=True)  # Again, by another name of the same folder.
    ours.write(theirs, ids=["ours"], memory=0)
    with pytest.raises(ek.EngramError, match=r"^directory: expected .* load it .*again"):
        ours.save_pretrained(folder, replace=True)
    kept = EpisodicMemory.from_pretrained(folder)
    assert "theirs" in kept.ids and kept.ledger["theirs"].text == "only another text"
    ours.save_pretrained(tmp_path / "aside")
    # A memory that never saw what is there replaces it, as it was asked to.
    mixed().save_pretrained(folder, replace=True)
    assert "theirs" not in EpisodicMemory.from_pretrained(folder).ids


def damage(folder, kind):
    config = folder / "config.json"
    (weights,) = folder.glob("*.safetensors")
    content = json.loads(config.read_text())
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif kind == "flipped":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no config":
        config.unlink()
    elif kind == "no kind":
        config.write_text("{}")
    elif kind == "no JSON":
        config.write_text(config.read_text()[:40])
    else:
        config.write_text(json.dumps(content | kind))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("cut", "is incomplete or was changed"),
        ("flipped", "is incomplete or was changed"),
        ("no weights", r"\(No such file or directory\)$"),
        ("no config", r"\(No such file or directory\)$"),
        ("no kind", r"\(no 'kind'\)$"),
        ("no JSON", "Unterminated string"),
        ({"slots": 9}, "config.json was changed"),
        ({"format": 2}, "its format is 2, not 1"),
        ({"kind": "bert"}, "its kind is 'bert'"),
        ({"ledger": []}, "config.json was changed"),
    ],
)
def test_damaged_and_foreign_files_are_refused(tmp_path, kind, reason):
    mixed().save_pretrained(tmp_path / "memory")
    damage(tmp_path / "memory", kind)
    with pytest.raises(ek.EngramError, match=rf"^directory: expected a saved memory, got .*{reason}"):
        EpisodicMemory.from_pretrained(tmp_path / "memory")


def forge(folder, **changes):
    """Another configuration, with the checksum that belongs to it."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    del config["checksum"]
    path.write_text(json.dumps(config | {"checksum": digest(config)}), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda ledger: {"slots": 9}, "gram has another shape or type than its configuration says"),
        (lambda ledger: {"state_dtype": "float32"}, "gram has another shape or type"),
        # One memory with the rows of both, and one id for two rows.
        (lambda ledger: {"ledger": [{**row, "memory": 0} for row in ledger]}, "its ledger has other rows"),
        (lambda ledger: {"ledger": [*ledger[:-1], {**ledger[-1], "id": 1}]}, "its ledger has other rows"),
    ],
)
def test_files_that_contradict_each_other_are_refused(tmp_path, change, reason):
    memory = mixed()
    memory.save_pretrained(tmp_path / "memory")
    lines = json.loads((tmp_path / "memory" / "config.json").read_text(encoding="utf-8"))["ledger"]
    forge(tmp_path / "memory", **change(lines))
    with pytest.raises(ek.EngramError, match=rf"^directory: expected a saved memory, got .*{reason}"):
        EpisodicMemory.from_pretrained(tmp_path / "memory")


def test_a_write_that_fails_on_its_way_leaves_the_old_files(tmp_path, monkeypatch):
    memory, folder = mixed(), tmp_path / "memory"
    memory.save_pretrained(folder)
    ids = memory.ids
    memory.forget(ids=[1])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engram_kernels._io.os.replace", full)
    with pytest.raises(
        ek.EngramError, match=r"^directory: expected one that can be written.* \(No space left on device\)$"
    ):
        memory.save_pretrained(folder, replace=True)
    assert EpisodicMemory.from_pretrained(folder).ids == ids
    monkeypatch.undo()
    memory.save_pretrained(folder, replace=True)  # Nor does this memory take its own attempt for another's.
    assert EpisodicMemory.from_pretrained(folder).ids == memory.ids


def test_a_folder_names_no_file_outside(tmp_path):
    memory = EpisodicMemory(K, C)
    memory.save_pretrained(tmp_path / "memory")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    forge(tmp_path / "memory", weights="../victim")
    with pytest.raises(ek.EngramError, match=r"^directory: expected a saved memory, .*its tensors are in"):
        memory.save_pretrained(tmp_path / "memory", replace=True)
    assert victim.read_text() == "mine"


def test_a_memory_travels_over_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    sent, memory = tmp_path / "sent", mixed()

    def upload(self, *, repo_id, folder_path, **_options):
        shutil.copytree(folder_path, sent)

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id)
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: sent)
    memory.push_to_hub("someone/facts")
    assert "from engram_kernels.memory import EpisodicMemory" in (sent / "README.md").read_text()
    other = EpisodicMemory.from_pretrained("someone/facts")
    assert other.ids == memory.ids and torch.equal(other.cross, memory.cross)


def test_what_keys_rows_have_is_kept(tmp_path):
    memory = mixed()
    memory.save_pretrained(tmp_path / "memory")
    assert EpisodicMemory.from_pretrained(tmp_path / "memory").keyed.tolist() == [0, 4]
