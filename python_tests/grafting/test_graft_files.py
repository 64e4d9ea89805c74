"""Grafts as folders, here and on the Hub."""

import model_zoo
import pytest
import torch
from editing_helpers import changed, weights
from grafting_helpers import some_graft

from engram_kernels import EngramError
from engram_kernels._io import read_sealed, write_sealed
from engram_kernels.grafting import Graft


def test_round_trip(tmp_path):
    model = model_zoo.small_model(dtype=torch.bfloat16)
    graft = some_graft(model, count=5000, base_model="small", metrics={"accuracy": 0.5}, recipe={"name": "x"})
    graft.save_pretrained(tmp_path / "graft")
    read = Graft.from_pretrained(tmp_path / "graft")
    assert read.shapes == graft.shapes and read.checksums == graft.checksums
    assert (read.base_model, read.metrics, read.recipe) == ("small", {"accuracy": 0.5}, {"name": "x"})
    for name, at in graft.indices.items():
        assert torch.equal(read.indices[name], at) and torch.equal(read.values[name], graft.values[name])
    weights = (tmp_path / "graft" / "graft_model.safetensors").read_bytes()
    header = 8 + int.from_bytes(weights[:8], "little")
    assert len(weights) - header <= 6.1 * graft.size
    assert {path.name for path in tmp_path.iterdir()} == {"graft"}
    with pytest.raises(EngramError, match="directory: expected a new or empty one"):
        graft.save_pretrained(tmp_path / "graft")


def damaged(folder, how):
    weights, config = folder / "graft_model.safetensors", folder / "graft_config.json"
    content = bytearray(weights.read_bytes())
    if how == "truncated":
        weights.write_bytes(content[:-5])
    elif how == "flipped bit":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "no weights":
        weights.unlink()
    elif how == "no configuration":
        config.unlink()
    elif how == "truncated configuration":
        config.write_text(config.read_text()[:-50])
    else:  # sealed anew: what is refused is not the checksum
        settings = read_sealed(config)
        files = list(settings["files"])
        name = next(iter(settings["parameters"]))
        if how == "format":
            settings["format"] = 99
        elif how == "smaller shape":
            for entry in settings["parameters"].values():
                entry["shape"] = [1]
        elif how == "missing parameter":
            settings["parameters"] = {}
        elif how == "not an object":
            settings["parameters"][name] = 3
        elif how == "no checksum of the weights":
            files = []
        write_sealed(config, settings, files)


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "flipped bit",
        "empty",
        "no weights",
        "no configuration",
        "truncated configuration",
        "format",
        "smaller shape",
        "missing parameter",
        "not an object",
        "no checksum of the weights",
    ],
)
def test_damaged_files_are_refused(tmp_path, how):
    model = model_zoo.small_model()
    some_graft(model).save_pretrained(tmp_path / "graft")
    damaged(tmp_path / "graft", how)
    before = weights(model)
    with pytest.raises(EngramError, match="name_or_directory: expected a saved graft, got "):
        Graft.from_pretrained(tmp_path / "graft").apply(model)
    assert not changed(before, model)


def test_metrics_that_are_no_json_are_refused(tmp_path):
    for bad in (float("nan"), torch.ones(2)):
        with pytest.raises(ValueError, match="metrics: expected finite numbers"):
            some_graft(model_zoo.small_model(), metrics={"x": bad}).save_pretrained(tmp_path / "graft")
    assert not list(tmp_path.iterdir())


def test_hub(tmp_path, monkeypatch):
    import huggingface_hub

    model = model_zoo.small_model()
    graft, calls = some_graft(model), []

    class Api:
        def __init__(self, **_options):
            pass

        def create_repo(self, repo_id, private, **_options):
            calls.append(("create", repo_id, private))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, **_options):
            calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))
            Graft.from_pretrained(folder_path)
            return "commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert graft.push_to_hub("me/skill", private=True) == "commit"
    names = ["README.md", "graft_config.json", "graft_model.safetensors"]
    assert calls == [("create", "me/skill", True), ("upload", "me/skill", names)]

    graft.save_pretrained(tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "snapshot"))
    assert Graft.from_pretrained("me/skill").size == graft.size

    def offline(*_, **__):
        raise OSError("no network. More about it.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(EngramError, match=r"a repository on the Hub, got 'me/skill' \(no network\)"):
        Graft.from_pretrained("me/skill")
