"""Folders and files that are written whole or not at all."""

import hashlib
import json
import stat

import pytest
import torch

from engram_kernels import EngramError
from engram_kernels._io import (
    file_checksum,
    let_all_read,
    load_cached,
    load_sealed_tensors,
    new_directory,
    read_sealed,
    save_sealed_tensors,
    write_sealed,
    write_tensor_folder,
)


def test_the_directory_is_not_blamed_for_another_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="source"), new_directory(tmp_path / "new"):
        (tmp_path / "source").read_bytes()
    assert not list(tmp_path.iterdir())


def full_disk(folder):
    raise OSError(28, "No space left on device")


def missing_inside(folder):
    (folder / "none" / "file").write_text("text")


@pytest.mark.parametrize("fault", [full_disk, missing_inside])
def test_the_directory_is_named_where_it_cannot_be_written(tmp_path, fault):
    with (
        pytest.raises(EngramError, match=r"^directory: expected one that can be written, got '.*new' \("),
        new_directory(tmp_path / "new") as folder,
    ):
        fault(folder)
    assert not list(tmp_path.iterdir())


def test_a_file_is_named_where_it_cannot_be_written(tmp_path, room_for):
    """Whoever writes it: safetensors has errors of its own."""
    path = tmp_path / "a.safetensors"
    with room_for(1000), pytest.raises(OSError, match="File too large") as caught:
        save_sealed_tensors(path, {"a": torch.zeros(1000)})
    assert caught.value.filename == str(path) and not list(tmp_path.iterdir())
    message = r"^directory: .* got '.*new' \(File too large\)$"
    with room_for(1000), pytest.raises(EngramError, match=message):
        write_tensor_folder(tmp_path / "new", "covariance", {"a": torch.zeros(1000)}, {})
    assert not list(tmp_path.iterdir())


def test_others_may_read_folders_in_folders(tmp_path):
    inner = tmp_path / "new" / "templates"
    inner.mkdir(parents=True)
    (inner / "file").touch(0o600)
    inner.chmod(0o700)
    let_all_read(tmp_path / "new")
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new", inner, inner / "file")]
    assert modes == [0o755, 0o755, 0o644]


CONTENT = {"format": 1, "name": "café", "sizes": [1, 2.5, None], "deep": {"it": True}}


@pytest.fixture
def sealed(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(range(64)))
    write_sealed(tmp_path / "config.json", CONTENT, ["weights"])
    return tmp_path / "config.json"


def test_what_was_sealed_is_read(sealed):
    assert read_sealed(sealed) == {**CONTENT, "files": {"weights": file_checksum(sealed.parent / "weights")}}


@pytest.mark.parametrize("name", ["config.json", "weights"])
def test_every_byte_is_sealed(sealed, name):
    path = sealed.parent / name
    original = path.read_bytes()
    for place, byte in enumerate(original):
        for other in (byte ^ 1, byte ^ 0x20, 0x20):
            if other != byte:
                path.write_bytes(original[:place] + bytes([other]) + original[place + 1 :])
                with pytest.raises(ValueError):
                    read_sealed(sealed)
        path.write_bytes(original[:place])
        with pytest.raises(ValueError):
            read_sealed(sealed)
        path.write_bytes(original[:place] + b" " + original[place:])
        with pytest.raises(ValueError):
            read_sealed(sealed)


def resealed(path, files):
    text = json.dumps({"files": files}, indent=2) + "\n"
    checksum = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps({"files": files, "checksum": checksum}, indent=2) + "\n")


def test_a_sealed_file_lies_in_its_folder(sealed):
    outside = sealed.parent.with_name("outside")
    outside.write_bytes(b"")
    for name in (str(outside), "../outside", "inner/../../outside"):
        resealed(sealed, {name: hashlib.sha256(b"").hexdigest()})
        with pytest.raises(ValueError, match="which is not in its folder"):
            read_sealed(sealed)


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": []}', '{"files": {}}', "[" * 100_000, '{"a": NaN}'])
def test_what_was_never_sealed_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError):
        read_sealed(tmp_path / "config.json")


def test_a_second_entry_of_one_name_is_refused(sealed):
    text = sealed.read_text()
    sealed.write_text(text.replace('  "format": 1', '  "format": 2,\n  "format": 1'))
    with pytest.raises(ValueError, match=r"config\.json is incomplete or was changed"):
        read_sealed(sealed)


def test_every_byte_of_sealed_tensors_is_sealed(tmp_path):
    path, about = tmp_path / "kept.safetensors", {"name": "café", "count": "3"}
    tensors = {"a": torch.tensor([1.0, float("nan"), -0.0]), "b": torch.arange(6).view(2, 3).T}
    save_sealed_tensors(path, tensors, about)
    found, told = load_sealed_tensors(path)
    assert told == about and found["b"].equal(tensors["b"])
    assert found["a"].view(torch.int32).equal(tensors["a"].view(torch.int32))
    original = path.read_bytes()
    for place, byte in enumerate(original):
        for changed in (bytes([byte ^ 1]), b"", bytes([byte, byte])):
            path.write_bytes(original[:place] + changed + original[place + 1 :])
            with pytest.raises(ValueError, match=r"^kept\.safetensors is incomplete or was changed: "):
                load_sealed_tensors(path)
    with pytest.warns(UserWarning, match=r"kept\.safetensors' cannot be used, and is made again \(kept"):
        assert load_cached(path) is None
    path.unlink()
    assert load_cached(path) is None
