"""`engram memory chat` and `engram memory ask --answer`, with small random models on disk."""

import io
import json
from functools import partial

import pytest
from command_line import refused
from model_zoo import byte_level_tokenizer, small_encoder, small_model, word_piece_tokenizer

from engram_kernels.memory import EpisodicMemory

pytestmark = pytest.mark.usefixtures("one_thread")

FACTS = ("The Eiffel Tower is in [b]Rome.", "The Louvre is a museum in Madrid.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("answers")
    for name, model, tokenizer in (
        ("encoder", small_encoder(), word_piece_tokenizer()),
        ("model", small_model("llama"), byte_level_tokenizer()),
    ):
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    (path / "facts").write_text("\n".join(FACTS), encoding="utf-8")
    return path


@pytest.fixture
def engram(engram, monkeypatch, folder, tmp_path):
    monkeypatch.chdir(folder)
    run = partial(engram, "memory")
    assert run("write", tmp_path / "m", "--facts", "facts", "--encoder", "encoder")[0] == 0
    return run


@pytest.fixture
def typed(monkeypatch):
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_ask_answers_in_a_sentence(engram, tmp_path):
    # A random model says nothing that it was told: the fact is quoted.
    status, out, err = engram("ask", tmp_path / "m", FACTS[0], "--answer", "--model", "model")
    assert (status, err) == (0, "")
    first, second, *table = out.splitlines()
    assert first == FACTS[0] and second.startswith("  quoted from 1, ") and FACTS[1] in "\n".join(table)


def test_chat_reads_the_memory_anew_for_each_question(engram, tmp_path, typed, monkeypatch):
    typed(f"{FACTS[0]}\n{FACTS[0]}\n\nnot asked\n")
    read, seen = EpisodicMemory.from_pretrained, []

    def reading(folder):
        memory = read(folder)
        seen.append(memory.ids)
        if len(seen) == 2:
            forgotten = read(folder)
            forgotten.forget(ids=["1"])
            forgotten.save_pretrained(folder, replace=True)
        return memory

    monkeypatch.setattr(EpisodicMemory, "from_pretrained", reading)
    status, out, err = engram("chat", tmp_path / "m", "--model", "model", "--only-memory")
    assert (status, err) == (0, "") and seen == [["1", "2"], ["1", "2"], ["2"]]
    lines = out.splitlines()
    asked = [at for at, line in enumerate(lines) if line == f"? {FACTS[0]}"]
    assert lines[asked[0] + 1] == FACTS[0] and lines[asked[1] + 1] != FACTS[0] and "not asked" not in out


def test_a_chat_in_json_is_an_object_a_line(engram, tmp_path, typed):
    typed(f"{FACTS[0]}\n\n")
    status, out, err = engram("chat", tmp_path / "m", "--model", "model", "--json")
    assert (status, err) == (0, "")
    (answer,) = map(json.loads, out.splitlines())
    assert (answer["question"], answer["answer"], answer["source"]) == (FACTS[0], FACTS[0], "quote")
    assert answer["facts"][0]["id"] == "1"


def test_an_empty_memory_knows_nothing(engram, tmp_path, typed):
    engram("forget", tmp_path / "m", "--id", "1", "--id", "2")
    typed("Where is it?\n")
    status, out, _ = engram("chat", tmp_path / "m", "--model", "model", "--only-memory")
    assert status == 0 and out.splitlines()[1] == "I don't know."
    typed("Where is it?\n")
    status, out, _ = engram("chat", tmp_path / "m", "--model", "model")
    assert status == 0 and out.splitlines()[2] == "  the model by itself: the memory has nothing near to this"


def test_what_cannot_be_loaded_is_refused(engram, tmp_path, typed):
    typed("")
    refused(engram("chat", tmp_path / "none"), "memory: expected a folder or a repository")
    refused(engram("chat", tmp_path / "m", "--model", "no/such/one"), "--model: expected")
    kept = EpisodicMemory(8, 8)
    kept.save_pretrained(tmp_path / "unnamed")
    refused(engram("chat", tmp_path / "unnamed"), "memory: expected one that names its encoder")
