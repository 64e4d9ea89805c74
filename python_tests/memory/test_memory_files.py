"""Folders that hold a memory to the bit, and those that are refused."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from memory_files import pack, unpack
from memory_helpers import assert_unchanged, frozen, latents, mixed

import engram_kernels as ek
from engram_kernels.memory import EpisodicMemory

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("state_dtype", [torch.float64, torch.float32])
def test_files_hold_a_memory_to_the_bit(tmp_path, state_dtype):
    memory = mixed(state_dtype=state_dtype)
    memory.matrix()
    memory.save_pretrained(str(tmp_path / "memory"))
    assert {path.name for path in (tmp_path / "memory").iterdir()} == {"README.md", "memory.safetensors"}
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
        assert {path.name for path in folder.iterdir()} == {"README.md", "memory.safetensors", ".lock"}
    (folder / "memory.safetensors").write_bytes((folder / "memory.safetensors").read_bytes()[:-8])
    memory.forget(ids=[2])
    memory.save_pretrained(str(folder), replace=True)
    memory.save_pretrained(tmp_path / "new", replace=True)
    for saved in (folder, tmp_path / "new"):
        assert EpisodicMemory.from_pretrained(saved).ids == memory.ids
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "memory.safetensors").write_text("{}")
    with pytest.raises(ek.EngramError, match=r"^directory: expected a saved memory"):
        memory.save_pretrained(tmp_path / "other", replace=True)
    assert (tmp_path / "other" / "memory.safetensors").read_text() == "{}"


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


FILE = "memory.safetensors"


@pytest.fixture
def saved(tmp_path):
    mixed().save_pretrained(tmp_path / "memory")
    return tmp_path / "memory"


def is_refused(folder, reason):
    with pytest.raises(
        ek.EngramError, match=rf"^directory: expected a saved memory, got .*{reason}"
    ) as error:
        EpisodicMemory.from_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:-8], "memory.safetensors is incomplete or was changed"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "is incomplete or was changed"),
        (lambda content: content.replace(b"minilm", b"minilL"), "is incomplete or was changed"),
        (lambda content: b"", "is incomplete or was changed"),
        (
            lambda content: content.replace(b"engram_kernels.memory.E", b"engram_kernels.memory.e"),
            "its kind is",
        ),
        (lambda content: content.replace(b'format\\": 1', b'format\\": 2'), "its format is 2, not 1"),
        (lambda content: content.replace(b'{"memory"', b'{"mamory"'), r"\(no 'memory'\)$"),
    ],
)
def test_damaged_and_foreign_files_are_refused(saved, damage, reason):
    content = (saved / FILE).read_bytes()
    assert damage(content) != content
    (saved / FILE).write_bytes(damage(content))
    is_refused(saved, reason)


def test_folders_without_a_file_are_refused(saved):
    (saved / FILE).unlink()
    is_refused(saved, r"\(No such file or directory\)$")
    (saved / FILE).mkdir()
    is_refused(saved, r"\(Is a directory\)$")
    (saved / FILE).rmdir()
    os.mkfifo(saved / FILE)
    is_refused(saved, r"\(no file\)$")


def settings(**changes):
    return lambda config, tensors, lines: (config | changes, tensors, lines)


def tensor(name, change):
    return lambda config, tensors, lines: (config, {**tensors, name: change(tensors[name])}, lines)


def line(**changes):
    return lambda config, tensors, lines: (config, tensors, [{**lines[0], **changes}, *lines[1:]])


# Files that somebody has made, with the right checksum.
FORGED = {
    "batch beyond bounds": (settings(batch=2**31), "labels: expected 2147483648, one for each memory, got 2"),
    "and labels": (settings(batch=2**12, labels=[None] * 2**12), "gram has another shape or type"),
    "slots": (settings(slots=9), "gram has another shape or type than its settings say"),
    "no slots": (settings(slots=0), "slots: expected at least 1"),
    "true": (settings(latent=True), "latent: expected an integer"),
    "dtype": (settings(state_dtype="float32"), "gram has another shape or type"),
    "unknown dtype": (settings(state_dtype="int8"), "no 'int8'"),
    "ridge": (settings(ridge=1.0), "its ridges are not those of its settings"),
    "no ridge": (settings(ridge=-1), "ridge: expected a number above 0"),
    "large ridge": (settings(ridge=10**400), "int too large to convert to float"),
    "encoder": (settings(encoder=["x"]), "encoder: expected its name, or None, got list"),
    "labels": (settings(labels=["x", "x"]), "labels: expected different ones"),
    "label": (settings(labels=["x", 1]), "labels: expected texts or None"),
    "no list of labels": (settings(labels="xy"), "its labels are no list"),
    "another setting": (settings(more=1), "it has other settings"),
    "NaN": (tensor("gram", lambda gram: gram * torch.nan), "gram is not finite"),
    "infinity": (tensor("m0", lambda m0: m0 / 0), "m0 is not finite"),
    "negative": (tensor("count", lambda count: -count), "count is negative"),
    "overflow": (tensor("count", lambda count: count + 2**62), "it counts more rows than there can be"),
    "more rows": (tensor("count", lambda count: count + 1), "its ledger has other rows than its state"),
    "fewer rows": (tensor("count", lambda count: count - 1), "its ledger has other rows than its state"),
    "keyed": (tensor("keyed", lambda keyed: keyed + 9), "its ledger has other rows than its state"),
    "ridges": (tensor("ridges", torch.zeros_like), "its ridges are not those of its settings"),
    "flat latents": (tensor("values.float32", lambda latents: latents.reshape(-1)), "than its ledger says"),
    "few latents": (tensor("values.float32", lambda latents: latents[1:]), "other rows than its latents"),
    "many latents": (tensor("values.float32", lambda rows: rows.repeat(2, 1)), "than its ledger says"),
    "short latents": (
        tensor("values.float32", lambda latents: latents[:, 1:].clone()),
        "than its ledger says",
    ),
    "endless latents": (tensor("keys.float32", lambda latents: latents / 0), "keys.float32 is not finite"),
    "latents of another type": (tensor("values.bfloat16", torch.Tensor.float), "than its ledger says"),
    "one number": (tensor("values.float32", torch.Tensor.sum), "of a 0-d tensor"),
    "id": (line(id=True), "its ledger has something that is no fact"),
    "list as id": (line(id=[1]), "its ledger has something that is no fact"),
    "id twice": (line(id=1), "its ledger has something that is no fact"),
    "memory": (line(memory=2), "its ledger has facts of other memories"),
    "another memory": (line(memory=1), "its ledger has other rows than its state"),
    "negative memory": (line(memory=-1), "memory: expected at least 0"),
    "text": (line(text=5), "its ledger has something that is no fact"),
    "half a character": (line(text="\ud800"), "surrogates not allowed"),
    "metadata": (line(metadata=[]), "its ledger has something that is no fact"),
    "endless metadata": (line(metadata={"x": float("inf")}), "Out of range float values"),
    "rows": (line(rows=10**9), "its ledger has other rows than its latents"),
    "no rows": (line(rows=0), "rows: expected at least 1"),
    "no such latents": (line(value="int8"), "no 'values.int8'"),
    "another entry": (line(more=1), "its ledger has something that is no fact"),
    "no list": (lambda config, tensors, lines: (config, tensors, {}), "its ledger is no list"),
    "no fact": (lambda config, tensors, lines: (config, tensors, [None]), "something that is no fact"),
    "no JSON": (lambda config, tensors, lines: (config, tensors, "[{"), "Expecting property name"),
    "depth": (lambda config, tensors, lines: (config, tensors, "[" * 10**5), "it is nested too deeply"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_files_are_refused(saved, case):
    forge, reason = FORGED[case]
    pack(saved / FILE, *forge(*unpack(saved / FILE)))
    is_refused(saved, reason)


def test_what_the_tests_pack_is_a_memory(saved):
    before = frozen(EpisodicMemory.from_pretrained(saved))
    pack(saved / FILE, *unpack(saved / FILE))
    assert_unchanged(EpisodicMemory.from_pretrained(saved), before)


def test_a_write_that_fails_on_its_way_leaves_the_old_files(tmp_path, monkeypatch):
    memory, folder = mixed(), tmp_path / "memory"
    memory.save_pretrained(folder)
    ids = memory.ids
    memory.forget(ids=[1])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engram_kernels.memory.storage.os.replace", full)
    with pytest.raises(
        ek.EngramError, match=r"^directory: expected one that can be written.* \(No space left on device\)$"
    ):
        memory.save_pretrained(folder, replace=True)
    assert EpisodicMemory.from_pretrained(folder).ids == ids
    monkeypatch.undo()
    memory.save_pretrained(folder, replace=True)  # Nor does this memory take its own attempt for another's.
    assert EpisodicMemory.from_pretrained(folder).ids == memory.ids


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
