"""`train_larimar.py` on small models and a few rows."""

import functools
import json
import shutil

import model_zoo
import pytest
import train_larimar as example
from larimar_helpers import sentence_encoder


@pytest.mark.slow
def test_it_trains_evaluates_and_goes_on_where_it_was_cut_off(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "HELD_BACK", 4)
    monkeypatch.setattr(example, "load_encoder", lambda name: sentence_encoder())
    bases = model_zoo.small_model(), model_zoo.byte_level_tokenizer()
    monkeypatch.setattr(example.loading, "load_model", lambda name: bases)
    recipe = functools.partial(
        example.Recipe, batch=4, hidden=8, slots=24, sizes=(1, 3), warm_start=5, held_objects=1, save_steps=2
    )
    monkeypatch.setattr(example, "Recipe", recipe)
    places = ("Paris", "Rome", "Italy", "Japan", "Brazil", "Zürich")
    rows = [
        {
            "case_id": number,
            "prompt": f"Tower {number} is located in",
            "subject": f"Tower {number}",
            "target_new": places[number % 6],
            "ground_truth": places[(number + 1) % 6],
            "rephrase_prompt": f"You know that Tower {number} is in",
            "locality_prompt": f"Museum {number} is located in",
            "locality_ground_truth": places[number % 6],
        }
        for number in range(12)
    ]
    known = [{"prompt": "The Louvre is in", "subject": "The Louvre", "attribute": "Paris"}]
    (tmp_path / "counterfact_dev.json").write_text(json.dumps(rows))
    (tmp_path / "known_1000.json").write_text(json.dumps(known))
    monkeypatch.setenv("ENGRAM_DATA", str(tmp_path))
    data = example.Data(example.Recipe(), bases[1])
    facts = data.facts(example.Recipe(facts=200))
    assert len(data.rows) == 8 and data.unseen
    assert not {fact.prompt for fact in facts} & {row["prompt"] for row in rows[:4]}
    assert not any(unseen in fact.target for fact in facts for unseen in data.unseen)
    out = tmp_path / "out"
    example.main(out=out, facts=20, lr=1e-3, rows=4, seed=0)
    results = json.loads((out / "results.json").read_text())
    assert results["cases"] == 4 and results["unseen targets"] >= 1
    assert results["single edits"]["memory"]["paraphrase"]["count"] == 4
    assert len(results["training"]["losses"]) == 0 and results["training"]["seconds to train"] > 0
    assert '"forgotten as bare"' in capsys.readouterr().out
    weights = (out / "model" / "model.safetensors").read_bytes()
    example.main(out=out, facts=20, lr=1e-3, rows=4, seed=0)  # all is read
    assert (out / "model" / "model.safetensors").read_bytes() == weights
    shutil.rmtree(out / "model")  # as if it had been interrupted after step 4 of 5
    (out / "training.json").unlink()
    shutil.rmtree(out / "checkpoints" / "checkpoint-5", ignore_errors=True)
    example.main(out=out, facts=20, lr=1e-3, rows=4, seed=0)
    assert json.loads((out / "results.json").read_text())["training"]["resumed at"] == "checkpoint-4"
    assert (out / "model" / "model.safetensors").read_bytes() == weights
