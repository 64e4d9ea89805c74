"""What a page takes for granted: the models, rows and files that its reader has."""

import copy
import json
import shutil
import warnings
from pathlib import Path

import grafting_helpers
import torch
from evaluation_helpers import EASY_EDIT, ROME
from model_zoo import small_model

from engram_kernels.editing import Edit, Editor, load_model
from engram_kernels.grafting import PromptTask
from engram_kernels.larimar import (
    EpisodeCollator,
    Fact,
    FactEpisodes,
    LarimarModel,
    ScopeDetector,
    ScopedModel,
)
from engram_kernels.memory import EpisodicMemory, load_encoder

PLACES = ("The Louvre", "The Colosseum", "A museum", "A tower", "Zürich", "The map", "The city", "A word")
EDITS = [Edit(place, "{} is located in the city of", "Rome") for place in PLACES]
ROWS = [(1, "a gripping film"), (0, "a waste of time"), (1, "they know why"), (0, "cut into pieces")] * 4


def saved_edits(layer=1, **folders):
    """Folders of saved edits of the small model."""
    editor = Editor(*load_model("smollm2"), contexts=((4, 2),))
    for folder, edits in folders.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with editor.edit(edits, layers=layer, method="emmet") as result:
                result.save_pretrained(folder.replace("_", "-"))


def facts_file(name):
    prompt = "{} is located in the city of"
    rows = [{"subject": place, "prompt": prompt, "target": "Rome"} for place in PLACES[:3]]
    Path(name).write_text("\n".join(map(json.dumps, rows)))


def data_sets():
    rows = [EASY_EDIT, ROME]
    for name in ("counterfact_dev.json", "counterfact.json"):
        Path(name).write_text(json.dumps(rows))
    known = ({"prompt": f"{place} lies in", "subject": place} for place in PLACES)
    Path("known_1000.json").write_text(
        json.dumps([{**one, "attribute": said(one["prompt"])} for one in known])
    )


def said(prompt):
    """What the small model answers; something else where that is no word."""
    model, tokenizer = load_model("smollm2")
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
    return tokenizer.decode(logits.argmax()).strip() or "Rome"


def model_and_tokenizer():
    return dict(zip(("model", "tokenizer"), load_model("smollm2"), strict=True))


def readme():
    given = model_and_tokenizer()
    return {"tuned": grafting_helpers.tuned(given["model"])}


def editing():
    saved_edits(edits=EDITS[:4], others=EDITS[4:6])
    data_sets()
    return {"base": load_model("smollm2")[0], "model": load_model("smollm2")[0]}


def evaluation():
    data_sets()
    return {}


def grafting():
    base, tokenizer = load_model("smollm2")
    tuned = grafting_helpers.tuned(base)
    task = PromptTask(tokenizer, "Review: {} Sentiment: It was", [" terrible", " great"])
    sentiment, questions = (grafting_helpers.some_graft(base, seed=seed) for seed in (1, 2))
    questions.save_pretrained("questions")
    shutil.copytree(base.name_or_path, "TUNED")
    tuned.save_pretrained("TUNED")
    for name in ("DATA", "TEST"):
        Path(name).write_text("\n".join(f"{label} {text}" for label, text in ROWS))
    return {
        "rows": ROWS,
        "test": ROWS,
        "tuned": tuned,
        "model": base,
        "sentiment": sentiment,
        "questions": questions,
        "other": questions,
        "batches_of_both": task.batches(ROWS, 8),
        "loss": task.loss,
        "trained": copy.deepcopy(base),
        "served": copy.deepcopy(base).bfloat16(),
        "torch": torch,
    }


def integrations():
    import peft
    import transformers

    saved_edits(edits=EDITS[:2])
    model, tokenizer = load_model("smollm2")
    lora = peft.LoraConfig(target_modules=["down_proj"], r=2, lora_alpha=2)
    peft.get_peft_model(load_model("smollm2")[0], lora).save_pretrained("my-lora")
    ids = torch.arange(8)
    return {
        "base": load_model("smollm2")[0],
        "model": model,
        "tokenizer": tokenizer,
        "rows": [{"input_ids": ids, "labels": ids}] * 4,
        "facts": [Fact(f"{place} is located in the city of", "Rome") for place in PLACES],
        "load_encoder": load_encoder,
        "transformers": transformers,
        "LarimarModel": LarimarModel,
        "FactEpisodes": FactEpisodes,
        "EpisodeCollator": EpisodeCollator,
    }


def large_models():
    from engram_kernels.editing import EditResult

    saved_edits(layer=6, **{f"share_{number}": [EDITS[number]] for number in range(1, 8)})
    return {"Editor": Editor, "EditResult": EditResult, "edits": EDITS, "number": 0} | model_and_tokenizer()


def larimar():
    decoder, tokenizer = load_model("smollm2")
    encoder = load_encoder("minilm")
    model = LarimarModel.from_bases("minilm", "smollm2")
    ScopedModel(model, tokenizer, encoder, ScopeDetector(0.9999)).save_pretrained("larimar/model")
    memory = EpisodicMemory(encoder.latent, encoder.latent, ridge=0.1, encoder="minilm")
    return {"memory": memory, "encoder": encoder, "decoder": decoder, "tokenizer": tokenizer}


def many_edits():
    data_sets()
    facts_file("many.jsonl")
    return {}


def methods():
    data_sets()
    return {}


def models():
    tokenizer = load_model("smollm2")[1]
    model = small_model("qwen3_moe", vocabulary=len(tokenizer), layers=8)
    return {"edit": EDITS[0], "model": model, "tokenizer": tokenizer, "editor": Editor(model, tokenizer)}


def store():
    facts_file("many.jsonl")
    return {}


def command_line():
    from engram_kernels.editing import EditStore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with EditStore("facts", *load_model("smollm2")) as kept:
            kept.add(EDITS[0])
    return {}


GIVEN = {
    "README.md": readme,
    "docs/command-line.md": command_line,
    "docs/editing.md": editing,
    "docs/evaluation.md": evaluation,
    "docs/grafting.md": grafting,
    "docs/integrations.md": integrations,
    "docs/large-models.md": large_models,
    "docs/larimar.md": larimar,
    "docs/many-edits.md": many_edits,
    "docs/methods.md": methods,
    "docs/models.md": models,
    "docs/store.md": store,
}
