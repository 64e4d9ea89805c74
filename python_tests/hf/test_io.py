"""Folders and files that are written whole or not at all."""

import stat

import pytest

from engram_kernels import EngramError
from engram_kernels._io import let_all_read, new_directory


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


def test_others_may_read_folders_in_folders(tmp_path):
    inner = tmp_path / "new" / "templates"
    inner.mkdir(parents=True)
    (inner / "file").touch(0o600)
    inner.chmod(0o700)
    let_all_read(tmp_path / "new")
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new", inner, inner / "file")]
    assert modes == [0o755, 0o755, 0o644]
