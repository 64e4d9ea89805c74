"""What `train_larimar.py` measures, against what the model says."""

import larimar_answers
import pytest
import torch
from larimar_helpers import LATENT, cases, encode, scoped_model

from engram_kernels.larimar import ScopeDetector
from engram_kernels.memory import EpisodicMemory


def test_words_of_answers():
    assert larimar_answers.word_f1("the city of Paris,", "Paris") == pytest.approx(2 / 5)
    assert larimar_answers.word_f1("Paris", "paris") == 1 and larimar_answers.word_f1("Rome", "Paris") == 0
    assert larimar_answers.word_f1("New New York", "New York") == pytest.approx(4 / 5)


def test_single_edits_are_answers_of_memories_of_one_fact():
    scoped = scoped_model()
    scoped.detector = ScopeDetector(-1.0)
    found = larimar_answers.single_edits(scoped, cases(), [False, True, False, False], tokens=4)
    firsts, f1 = [], []
    for case in cases():
        scoped.write([case.edit.prompt_text], [case.edit.target])
        for prompt in (case.edit.prompt_text, *case.paraphrases):
            ids = scoped.generate([prompt], scoped.model.read(encode([prompt])), max_new_tokens=4)[0].tolist()
            target = scoped.tokenizer(f" {case.edit.target}")["input_ids"]
            text = scoped.tokenizer.decode(ids).strip().split("\n")[0].split(".")[0]
            firsts.append(float(ids[0] == target[0]))
            f1.append(larimar_answers.word_f1(text, case.edit.target))
        scoped.forget([case.edit.prompt_text])
    assert found["memory"]["prompt"].first == pytest.approx(sum(firsts[::2]) / 4)
    assert found["memory"]["paraphrase"].f1 == pytest.approx(sum(f1[1::2]) / 4)
    assert found["memory"]["paraphrase, unseen target"] == larimar_answers.Score(firsts[3], f1[3], 1)
    assert found["scoped memory"] == found["memory"]  # everything is in scope
    scoped.detector = ScopeDetector(2.0)
    nothing = larimar_answers.single_edits(scoped, cases(), [False] * 4, tokens=4)
    assert nothing["scoped memory"] == nothing["bare decoder"]
    assert set(nothing["memory"]) == {"prompt", "paraphrase"}


def test_forgetting_and_locality_through_the_detector():
    scoped = scoped_model()
    result = larimar_answers.forgetting(scoped, cases(), tokens=4)
    assert result["forgotten as bare"] == 1
    assert result["forgotten, after"] == result["forgotten, bare"]
    assert result["kept, after"] == result["kept, before"]
    local = larimar_answers.locality(scoped, cases(), tokens=4)
    assert local["answered as bare"] == 1 and local["without the detector"] < 1
    assert local["prompts in scope"] == 1 and local["neighbours in scope"] == 0
    counts = larimar_answers.batch_edits(scoped, cases(), [1, 3], tokens=4)
    assert list(counts) == [1, 3] and counts[3]["prompt"].count == 3


def test_memories_of_the_evaluation_lie_where_the_latents_do(monkeypatch):
    places = []

    def written(memory, values, keys, ids):
        places.extend((memory.gram.device.type, values.device.type, keys.device.type))

    scoped = scoped_model()
    monkeypatch.setattr(EpisodicMemory, "write", written)
    monkeypatch.setattr(
        scoped.encoder, "encode", lambda texts: torch.empty(len(texts), LATENT, device="meta")
    )
    larimar_answers._memory_of(scoped, cases())
    assert places == ["meta"] * 3
