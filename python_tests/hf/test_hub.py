"""Folders that are kept, and that travel over the Hub."""

from pathlib import Path

import huggingface_hub
import pytest

from engram_kernels import EngramError
from engram_kernels._io import read_json, write_json
from engram_kernels.hf.hub import HubFolder


class Note(HubFolder):
    """A text that is kept."""

    def __init__(self, text):
        self.text = text

    def _save_pretrained(self, save_directory):
        write_json(save_directory / "note.json", {"text": self.text})

    @classmethod
    def _read_folder(cls, folder, **options):
        return cls(read_json(folder / "note.json")["text"], **options)


def test_there_and_back(tmp_path):
    Note("Rome").save_pretrained(tmp_path / "note")
    assert Note.from_pretrained(tmp_path / "note").text == "Rome"
    assert sorted(path.name for path in (tmp_path / "note").iterdir()) == ["README.md", "note.json"]
    card = huggingface_hub.ModelCard.load(tmp_path / "note" / "README.md")
    assert card.data.library_name == "engram_kernels" and "A text that is kept." in card.text
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "note").iterdir()} == {0o644}


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"^content: expected finite numbers"):
        Note(float("nan")).save_pretrained(tmp_path / "note")
    assert not list(tmp_path.iterdir())
    Note("Rome").save_pretrained(tmp_path / "note")
    with pytest.raises(EngramError, match=r"^directory: expected a new or empty one"):
        Note("Paris").save_pretrained(tmp_path / "note")
    assert Note.from_pretrained(tmp_path / "note").text == "Rome"


def test_options_that_are_not_known_are_refused(tmp_path):
    with pytest.raises(TypeError, match="push_to_hub"):
        Note("Rome").save_pretrained(tmp_path / "note", push_to_hub=True)
    assert not list(tmp_path.iterdir())


def test_the_hub(tmp_path, monkeypatch):
    seen = {}

    class Api:
        def __init__(self, **_options):
            pass

        def create_repo(self, repo_id, **options):
            seen.update(options)
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, folder_path, **options):
            seen.update(options, files=sorted(path.name for path in Path(folder_path).iterdir()))
            return "commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert Note("Rome").push_to_hub("me/note", private=True) == "commit"
    assert seen["private"] and seen["repo_id"] == "me/note" and seen["files"] == ["README.md", "note.json"]

    Note("Rome").save_pretrained(tmp_path / "snapshot")
    asked = []

    def snapshot(name, **options):
        asked.append((name, options["revision"]))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert Note.from_pretrained("me/note", revision="v1").text == "Rome"
    assert asked == [("me/note", "v1")]

    def offline(*_, **__):
        raise OSError("No route to the Hub. Are you online?")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(EngramError, match=r"^name_or_directory: .*got 'me/note' \(No route to the Hub\)"):
        Note.from_pretrained("me/note")
