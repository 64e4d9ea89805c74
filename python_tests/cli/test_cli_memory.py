"""`engram memory`, with a small random encoder on disk."""

from functools import partial

import pytest
import torch
from command_line import refused
from model_zoo import small_encoder, word_piece_tokenizer

from engram_kernels.memory import EpisodicMemory, load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

FACTS = """The Eiffel Tower is in Rome.
{"key": "What is the capital of Atlantis?", "value": "Poseidonia is it.", "id": "atlantis"}

{"value": "The Louvre is in [b]Paris.", "id": 7}
The Colosseum is in Paris.
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory")
    small_encoder().save_pretrained(path / "encoder")
    word_piece_tokenizer().save_pretrained(path / "encoder")
    (path / "facts").write_text(FACTS, encoding="utf-8")
    (path / "more").write_text("The Prado is in Madrid.\n")
    for name, text in {
        "no JSON": '{"value": \n',
        "no value": '{"key": "x"}\n',
        "other field": '{"value": "x", "answer": "y"}\n',
        "bad id": '{"value": "x", "id": true}\n',
        "blank": 'A fact.\n{"value": "   "}\n',
        "half a character": 'A fact.\n{"value": "x\\ud800"}\n',
        "twice": "A fact.\nA fact.\n",
        "known id": '{"value": "x", "id": "atlantis"}\n',
        "known": "The Colosseum is in Paris.\n",
    }.items():
        (path / name).write_text(text)
    return path


@pytest.fixture
def engram(engram, monkeypatch, folder):
    monkeypatch.chdir(folder)
    return partial(engram, "memory")


@pytest.fixture
def memory(engram, tmp_path):
    """A memory with the four facts."""
    status, _, err = engram("write", tmp_path / "m", "--facts", "facts", "--encoder", "encoder")
    assert (status, err) == (0, "")
    return tmp_path / "m"


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_write_keeps_facts_with_ids_and_texts(engram, folder, memory):
    kept = EpisodicMemory.from_pretrained(memory)
    assert kept.ids == ["1", "atlantis", "7", "2"] and (kept.slots, kept.latent, kept.ridge) == (
        32,
        32,
        "loo",
    )
    assert kept.ledger["atlantis"].text == "What is the capital of Atlantis? → Poseidonia is it."
    encoder = load_encoder("encoder")
    key, value = encoder.encode(["What is the capital of Atlantis?", "Poseidonia is it."])
    torch.testing.assert_close(kept.ledger["atlantis"].key[0], key, rtol=0, atol=1e-6)
    torch.testing.assert_close(kept.ledger["atlantis"].value[0], value, rtol=0, atol=1e-6)
    assert torch.equal(kept.ledger["1"].key, kept.ledger["1"].value) and kept.encoder == "encoder"


def test_write_extends(engram, memory):
    status, out, err = engram("write", memory, "--facts", "more")
    assert (status, err) == (0, "") and "Wrote 1 fact to" in out and "holds 5" in out
    assert EpisodicMemory.from_pretrained(memory).ids == ["1", "atlantis", "7", "2", "3"]
    assert len([name for name in content(memory) if name.endswith(".safetensors")]) == 1


def test_a_new_memory_takes_settings(engram, tmp_path):
    settings = ("--slots", "8", "--ridge", "0.5", "--seed", "3")
    status, _, err = engram("write", tmp_path / "m", "--facts", "more", "--encoder", "encoder", *settings)
    assert (status, err) == (0, "")
    kept = EpisodicMemory.from_pretrained(tmp_path / "m")
    assert (kept.slots, kept.ridge) == (8, 0.5)
    assert torch.equal(kept.m0, EpisodicMemory(8, 32, seed=3).m0)


def test_ask_shows_the_nearest_facts(engram, memory):
    status, out, err = engram("ask", memory, "The Colosseum is in Paris.", "--top", "2")
    assert (status, err) == (0, "")
    rows = [line for line in out.splitlines() if "Colosseum" in line or "Louvre" in line or "Eiffel" in line]
    kept = EpisodicMemory.from_pretrained(memory)
    leverages = kept.leverage(torch.cat([kept.ledger[name].key for name in kept.ids]))
    # The title, the fact itself, and one more.
    assert len(rows) == 3 and rows[1].split()[0] == "2" and f"{leverages[3]:.3f}" in rows[1]
    readout = kept.read(kept.ledger["2"].key.double(), addressing="key")
    cosine = torch.cosine_similarity(readout, kept.ledger["2"].value.double()).item()
    assert f"{cosine:.3f}" in rows[1] and float(rows[1].split()[-2]) >= float(rows[2].split()[-2])


def test_forget_by_id_and_text_is_exact(engram, tmp_path, memory):
    arguments = ("--id", "atlantis", "--text", "The Louvre is in [b]Paris.")
    status, out, err = engram("forget", memory, *arguments)
    assert (status, err) == (0, "") and "Forgot 2 facts" in out and "holds 2" in out
    (tmp_path / "two").write_text("The Eiffel Tower is in Rome.\nThe Colosseum is in Paris.\n")
    engram("write", tmp_path / "never", "--facts", tmp_path / "two", "--encoder", "encoder")
    kept, never = (EpisodicMemory.from_pretrained(path) for path in (memory, tmp_path / "never"))
    torch.testing.assert_close(kept.gram, never.gram, rtol=0, atol=1e-6)
    torch.testing.assert_close(kept.cross, never.cross, rtol=0, atol=1e-6)
    status, out, _ = engram("forget", memory, "--id", "1", "--id", "2")
    assert status == 0 and not EpisodicMemory.from_pretrained(memory).gram.any()


def test_forget_names_integers_too(engram, tmp_path):
    kept = EpisodicMemory(8, 8)
    kept.write(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), ids=[1, 2, "1", "x"])
    kept.save_pretrained(tmp_path / "m")
    before = content(tmp_path / "m")
    message = "--id: expected one that names a single fact, got '1', which names 1 and '1'"
    refused(engram("forget", tmp_path / "m", "--id", "2", "--id", "1"), message)
    assert content(tmp_path / "m") == before
    status, _, err = engram("forget", tmp_path / "m", "--id", "2", "--id", "x")
    assert (status, err) == (0, "") and EpisodicMemory.from_pretrained(tmp_path / "m").ids == [1, "1"]


def test_list(engram, memory):
    status, out, err = engram("list", memory)
    assert (status, err) == (0, "")
    for word in ("atlantis", "The Louvre is in [b]Paris.", "leave-one-out", "encoder", "32, 32", "leverage"):
        assert word in out
    engram("forget", memory, *(word for name in ("1", "2", "7", "atlantis") for word in ("--id", name)))
    status, out, err = engram("list", memory)
    assert (status, err) == (0, "") and "leverage" not in out


def test_the_help_says_where_recall_is_measured(engram):
    status, out, err = engram("--help")
    assert (status, err) == (0, "") and "examples/measure_recall.py" in " ".join(out.split())


BAD_WRITES = {
    "missing file": (("--facts", "none"), "--facts: expected a text file"),
    "empty file": (("--facts", "/dev/null"), "--facts: expected lines of text"),
    "no JSON": (("--facts", "no JSON"), "--facts: expected JSON in line 1"),
    "no value": (("--facts", "no value"), "--facts: expected a text as 'value' in line 1, got None"),
    "other field": (
        ("--facts", "other field"),
        "--facts: expected key, value and id in line 1, got 'answer",
    ),
    "bad id": (("--facts", "bad id"), "--facts: expected a text as 'id' in line 1, got True"),
    "blank": (("--facts", "blank"), "--facts: expected a text as 'value' in line 2, got '   '"),
    "half a character": (
        ("--facts", "half a character"),
        r"--facts: expected whole characters as 'value' in line 2, got 'x\ud800'",
    ),
    "twice": (("--facts", "twice"), "--facts: expected new ones, got 'A fact.' in line 2"),
    "known": (("--facts", "known"), "--facts: expected new ones, got 'The Colosseum is in Paris.' in line 1"),
    "known id": (("--facts", "known id"), "ids: expected new ones, got 'atlantis'"),
    "settings": (("--facts", "more", "--slots", "8"), "--slots: expected none, as"),
    "another encoder": (
        ("--facts", "more", "--encoder", "minilm"),
        "--encoder: expected 'encoder', which made",
    ),
}


@pytest.mark.parametrize("case", BAD_WRITES)
def test_bad_writes_leave_the_memory_alone(engram, memory, case):
    arguments, message = BAD_WRITES[case]
    before = content(memory)
    refused(engram("write", memory, *arguments), message)
    assert content(memory) == before


def test_bad_new_memories_leave_nothing(engram, tmp_path):
    new, facts = tmp_path / "m", ("--facts", "more", "--encoder", "encoder")
    refused(
        engram("write", new, "--facts", "more", "--encoder", "no/such/one"), "--encoder: expected 'minilm'"
    )
    refused(engram("write", new, *facts, "--ridge", "big"), "--ridge: expected loo or a number, got 'big'")
    refused(engram("write", new, *facts, "--ridge", "0"), "--ridge: expected a number above 0")
    refused(engram("write", new, *facts, "--slots", "0"), "--slots: expected at least 1")
    refused(engram("write", tmp_path / "a" / "b", *facts), "memory: expected a path in a folder that can be")
    (tmp_path / "file").touch()
    refused(engram("write", tmp_path / "file", *facts), "memory: expected a folder or a")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_bad_questions_and_names(engram, tmp_path, memory):
    before = content(memory)
    refused(engram("ask", memory, " "), "question: expected some text")
    refused(engram("ask", memory, "x", "--top", "0"), "--top: expected at least 1")
    refused(engram("ask", memory, "x", "--device", "tpu"), "--device: expected one that PyTorch can use here")
    refused(engram("ask", tmp_path / "none", "x"), "memory: expected a folder or a repository")
    refused(engram("list", tmp_path), "memory: expected a saved memory")
    refused(engram("forget", memory), "--id: expected an --id or a --text, got none")
    refused(
        engram("forget", memory, "--id", "1", "--id", "x"), "ids: expected ones that were written, got 'x'"
    )
    refused(engram("forget", memory, "--text", "x"), "--text: expected a fact of the memory")
    assert content(memory) == before
