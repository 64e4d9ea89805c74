"""A model out of a GGUF file: read by a path, converted once."""

import os
import shutil
from pathlib import Path

import model_zoo
import pytest
import torch
from gguf_files import write_gguf

from engram_kernels import _io
from engram_kernels.editing import load_model
from engram_kernels.errors import EngramError
from engram_kernels.hf import loading
from engram_kernels.hf.loading import gguf_file
from engram_kernels.hf.shards import Checkpoint, checkpoint_folder

pytest.importorskip("gguf")
pytest.importorskip("accelerate")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A file in a folder of its own, the model in it and its tokenizer."""
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    model, tokenizer = model_zoo.small_model(), model_zoo.byte_level_tokenizer()
    path = tmp_path / "files" / "small-f32.gguf"
    path.parent.mkdir()
    write_gguf(path, model, tokenizer)
    return path, model, tokenizer


def test_a_file_or_its_folder_is_a_model(small):
    path, model, tokenizer = small
    expected = dict(model.named_parameters())
    for source in (path, str(path.parent)):
        loaded, words = load_model(source, torch.bfloat16)
        assert loaded.dtype == torch.bfloat16
        for name, weight in loaded.named_parameters():
            assert torch.equal(weight, expected[name].bfloat16()), name
        assert words("Rome is").input_ids == tokenizer("Rome is").input_ids


def test_it_is_converted_once_and_anew_when_it_changes(small):
    path, model, tokenizer = small
    folder = checkpoint_folder(path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    load_model(path)
    assert checkpoint_folder(path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    write_gguf(path, model, tokenizer)
    assert torch.equal(load_model(path)[0].lm_head.weight, model.lm_head.weight)


def cut(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", flip),
        ("tokenizer.json", Path.unlink),
        (loading.SEAL, cut),
        (loading.SEAL, Path.unlink),
    ],
)
def test_what_was_spoilt_is_converted_anew(small, spoil, name):
    path, model, _ = small
    folder = checkpoint_folder(path)
    spoil(folder / name)
    with pytest.warns(UserWarning, match=f"'{folder}' is not as it was written, and is made again"):
        loaded, _ = load_model(path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loading.is_whole(folder) and [one.name for one in folder.parent.iterdir()] == [folder.name]
    assert not (folder / "spoilt").exists()


def test_what_is_written_from_it_has_no_seal(small, tmp_path):
    """Which is of the cache's files, and not of changed ones."""
    folder = checkpoint_folder(small[0])
    Checkpoint(folder).rewrite(tmp_path / "new", {})
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names - {loading.SEAL} < names


def test_a_full_cache_is_said(small, room_for):
    path, _, _ = small
    message = r"^the cache \(\$ENGRAM_CACHE\): expected room for .*small-f32-.*File too large"
    with room_for(10_000), pytest.raises(EngramError, match=message):
        load_model(path)
    assert not list((path.parent.parent / "cache").iterdir())


def test_files_with_other_times_and_the_same_bytes_are_kept(small, monkeypatch):
    path, _, _ = small
    folder = checkpoint_folder(path)
    os.utime(folder / "model.safetensors", (1, 1))
    monkeypatch.setattr(loading, "_read_gguf", lambda *_: pytest.fail("converted anew"))
    load_model(path)


@pytest.mark.parametrize("spoil", [cut, flip])
def test_a_copy_is_read_once_and_looked_after_from_then_on(small, tmp_path, monkeypatch, spoil):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint_folder(small[0]), copy, copy_function=shutil.copyfile)
    read, whole = [], _io.file_checksum
    monkeypatch.setattr(_io, "file_checksum", lambda path: read.append(path) or whole(path))
    assert loading.is_whole(copy) and copy / "model.safetensors" in read
    read.clear()
    assert loading.is_whole(copy) and not read
    spoil(copy / "model.safetensors")
    assert not loading.is_whole(copy)


def test_a_copy_that_was_cut_off_is_found(small, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint_folder(small[0]), copy, copy_function=shutil.copyfile)
    cut(copy / "model.safetensors")
    assert not loading.is_whole(copy) and not loading.is_whole(copy)


def test_a_copy_that_cannot_be_written_is_read_again(small, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint_folder(small[0]), copy, copy_function=shutil.copyfile)

    def refuse(*_, **__):
        raise PermissionError

    monkeypatch.setattr(loading, "write_sealed", refuse)
    assert loading.is_whole(copy) and loading.is_whole(copy)


def test_files_in_folders_are_sealed_too(tmp_path):
    """As templates that a tokenizer has beside its own one."""
    inner = tmp_path / "additional_chat_templates" / "tools.jinja"
    inner.parent.mkdir()
    inner.write_text("{{ messages }}")
    (tmp_path / "config.json").write_text("{}")
    loading.seal(tmp_path)
    assert loading.is_whole(tmp_path)
    cut(inner)
    assert not loading.is_whole(tmp_path)


def test_what_is_no_gguf_file_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(10))
    with pytest.raises(EngramError, match=r"^name_or_directory: expected .* got '.*broken.gguf'") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


def test_which_file_a_path_names(tmp_path):
    assert gguf_file(tmp_path / "none") is None
    (tmp_path / "one.gguf").touch()
    assert gguf_file(tmp_path) == gguf_file(tmp_path / "one.gguf") == tmp_path / "one.gguf"
    (tmp_path / "model.safetensors").touch()
    assert gguf_file(tmp_path) is None  # the plain weights are read
    (tmp_path / "model.safetensors").rename(tmp_path / "two.gguf")
    assert gguf_file(tmp_path) is None
