"""`engram memory`, with a small random encoder on disk."""

import json
import re
import shutil
from datetime import datetime, timedelta, timezone
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
        "field twice": '{"value": "x", "value": "y"}\n',
        "list": '["a", "b"]\n',
        "bad tags": '{"value": "x", "tags": "y"}\n',
        "bad tag": '{"value": "x", "tags": [1]}\n',
        "ids twice": 'A fact.\n{"value": "x", "id": 5}\n\n{"value": "y", "id": "5"}\n',
        "escape": "A fact.\nA \x1b[2Jscreen.\n",
        "no byte order mark": "A fact.\n".encode("utf-16-le").decode("latin-1"),
        "contradiction": '{"key": "who?", "value": "x"}\n{"key": " Who? ", "value": "y"}\n',
        "known key": 'A fact.\n{"key": "what is the capital of  Atlantis?", "value": "Lost."}\n',
        "bad id": '{"value": "x", "id": true}\n',
        "blank": 'A fact.\n{"value": "   "}\n',
        "half a character": 'A fact.\n{"value": "x\\ud800"}\n',
        "known id": '{"value": "x", "id": "atlantis"}\n',
        "known": "The Colosseum is in Paris.\n",
    }.items():
        (path / name).write_text(text)
    (path / "latin").write_bytes("A fact.\nA café.\n".encode("latin-1"))
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
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != ".lock"}


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


def ask(engram, memory, question, *options):
    status, out, err = engram("ask", memory, question, "--json", *options)
    assert (status, err) == (0, "")
    return json.loads(out)


def test_ask_shows_what_a_question_is_about(engram, memory):
    status, out, err = engram("ask", memory, "The Colosseum is in Paris.", "--top", "2")
    assert (status, err) == (0, "")
    # The fact itself, and one more: which depends on the word pieces, whose training breaks ties at random.
    rows = [line.split() for line in out.splitlines() if re.search(r" -?[01]\.\d{3}\s*$", line)]
    assert len(rows) == 2 and rows[0][:2] == ["✓", "2"] and rows[0][-1] == "1.000"
    kept = EpisodicMemory.from_pretrained(memory)
    assert f"✓ from {kept.threshold():.3f} on" in out and "leverage" not in out
    found = ask(engram, memory, "What is a cantata?", "--top", "4")
    (expected,) = kept.recall(load_encoder("encoder").encode(["What is a cantata?"]))
    assert [fact["id"] for fact in found["facts"]] == [fact.name for fact in expected]
    for fact, (_, _, score, known) in zip(found["facts"], expected, strict=True):
        assert (fact["known"], fact["score"]) == (known, pytest.approx(score, abs=1e-6))
    assert (found["known"], found["threshold"]) == (expected[0].known, kept.threshold())
    _, out, _ = engram("ask", memory, "The Colosseum is in Paris.", "--verbose")
    leverages = kept.leverage(torch.cat([kept.ledger[name].key for name in kept.ids]))
    (row,) = [line.split() for line in out.splitlines() if "Colosseum" in line and "✓" in line]
    assert f"{leverages[3]:.3f}" in row and row[-1].startswith("20")


def test_ask_says_when_it_does_not_know(engram, memory, monkeypatch):
    monkeypatch.setattr(EpisodicMemory, "threshold", lambda self, memory=None: 2.0)
    status, out, _ = engram("ask", memory, "The Colosseum is in Paris.")
    assert status == 0 and "No fact is about this: the nearest scores 1.000, less than 2.000." in out
    assert "✓" not in out


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
    for word in ("atlantis", "The Louvre is in [b]Paris.", "leave-one-out", "encoder", "32, 32"):
        assert word in out
    assert "leverage" not in out and "leverage" in engram("list", memory, "--verbose")[1]
    engram("forget", memory, *(word for name in ("1", "2", "7", "atlantis") for word in ("--id", name)))
    status, out, err = engram("list", memory, "--verbose")
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
        "--facts: expected key, value, id and tags in line 1, got 'answer",
    ),
    "bad id": (("--facts", "bad id"), "--facts: expected a text as 'id' in line 1, got True"),
    "blank": (("--facts", "blank"), "--facts: expected a text as 'value' in line 2, got '   '"),
    "half a character": (
        ("--facts", "half a character"),
        r"--facts: expected whole characters as 'value' in line 2, got 'x\ud800'",
    ),
    "field twice": (("--facts", "field twice"), '--facts: expected JSON in line 1, got \'{"value": "x", '),
    "list": (("--facts", "list"), "--facts: expected plain text or a JSON object in line 1, got the list '["),
    "bad tags": (("--facts", "bad tags"), "--facts: expected a list of texts as 'tags' in line 1, got 'y'"),
    "bad tag": (("--facts", "bad tag"), "--facts: expected a text as 'tags' in line 1, got 1"),
    "ids twice": (
        ("--facts", "ids twice"),
        "--facts: expected different ids, got '5' in line 2 and in line 4",
    ),
    "escape": (("--facts", "escape"), "--facts: expected text in line 2, got the control character U+001B"),
    "no byte order mark": (
        ("--facts", "no byte order mark"),
        "--facts: expected text in line 1, got the control",
    ),
    "latin": (
        ("--facts", "latin"),
        "--facts: expected UTF-8, or UTF-16 or UTF-32 with a byte order mark, got",
    ),
    "contradiction": (
        ("--facts", "contradiction"),
        "--facts: expected no contradictions, got 'Who? → y' in line 2, where line 1 says 'who? → x'; --",
    ),
    "known key": (
        ("--facts", "known key"),
        "--facts: expected no contradictions, got 'what is the capital of  Atlantis? → Lost.' in line 2, "
        "where 'atlantis' says",
    ),
    "known": (
        ("--facts", "known"),
        "--facts: expected new ones, got 'The Colosseum is in Paris.' in line 1, which is known as '2'",
    ),
    "known id": (
        ("--facts", "known id"),
        "--facts: expected no contradictions, got 'x' in line 1, where 'atlantis' says 'What is the capital",
    ),
    "known id, keep": (
        ("--facts", "known id", "--on-conflict", "keep"),
        "--facts: expected no contradictions",
    ),
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
        engram("forget", memory, "--id", "1", "--id", "x"),
        "--id: expected a fact of the memory, as it lists it",
    )
    refused(engram("forget", memory, "--text", "x"), "--text: expected a fact of the memory")
    assert content(memory) == before


def facts_of(engram, memory, *options):
    status, out, err = engram("list", memory, "--json", *options)
    assert (status, err) == (0, "")
    return {fact["id"]: fact for fact in json.loads(out)["facts"]}


def write(engram, memory, path, text, *options):
    (path / "new").write_text(text, encoding="utf-8")
    status, out, err = engram("write", memory, "--facts", path / "new", "--json", *options)
    assert (status, err) == (0, "")
    return json.loads(out)


def test_a_growing_file_can_be_written_again(engram, tmp_path, memory):
    before = datetime.now(timezone.utc) - timedelta(seconds=2)
    told = write(
        engram, memory, tmp_path, FACTS + "The  Colosseum is in Paris.\nNew.\nNew.\n", "--skip-known"
    )
    assert (told["written"], told["known_lines"], told["repeated_lines"]) == (["3"], [1, 2, 4, 5, 6], [8])
    assert told["facts"] == 5 and facts_of(engram, memory)["3"]["text"] == "New."
    written = datetime.fromisoformat(facts_of(engram, memory)["3"]["written"])
    assert before <= written <= datetime.now(timezone.utc)
    told = write(engram, memory, tmp_path, FACTS, "--skip-known")
    assert (told["written"], told["facts"]) == ([], 5)


NEWER = '{"key": "What is the capital of Atlantis?", "value": "Gone."}\n{"value": "Other.", "id": 7}\nNew.\n'


def test_the_newest_of_contradicting_facts_stays(engram, tmp_path, memory):
    told = write(engram, memory, tmp_path, NEWER, "--on-conflict", "newest")
    assert told["written"] == ["atlantis", "7", "3"] and sorted(told["replaced"]) == ["7", "atlantis"]
    assert [(found["line"], found["id"]) for found in told["contradictions"]] == [(1, "atlantis"), (2, "7")]
    facts = facts_of(engram, memory)
    assert (facts["atlantis"]["value"], facts["7"]["value"], len(facts)) == ("Gone.", "Other.", 5)
    told = write(
        engram,
        memory,
        tmp_path,
        '{"key": "k", "value": "a"}\n{"key": "K", "value": "b"}\n',
        "--on-conflict",
        "newest",
    )
    assert told["written"] == ["4"] and facts_of(engram, memory)["4"]["value"] == "b"
    status, out, _ = engram("write", memory, "--facts", "known key", "--on-conflict", "newest")
    assert status == 0 and "Line 2 replaced atlantis: " in out


def test_contradicting_facts_can_be_kept_and_the_newest_is_shown_first(engram, tmp_path, memory):
    told = write(engram, memory, tmp_path, NEWER.splitlines()[0], "--on-conflict", "keep")
    assert told["written"] == ["3"] and not told["replaced"] and told["facts"] == 5
    found = ask(engram, memory, "What is the capital of Atlantis?")["facts"]
    assert [fact["id"] for fact in found[:2]] == ["3", "atlantis"]
    _, out, _ = engram("ask", memory, "What is the capital of Atlantis?")
    assert "older than 3" in " ".join(out.split())


def test_update(engram, tmp_path, memory):
    before = EpisodicMemory.from_pretrained(memory)
    status, out, err = engram("update", memory, "--id", "atlantis", "Lost.")
    assert (status, err) == (0, "") and "What is the capital of Atlantis? → Lost." in " ".join(out.split())
    status, out, err = engram(
        "update", memory, "--text", "The Colosseum is in Paris.", "It is in Rome.", "--json"
    )
    assert (status, err) == (0, "") and json.loads(out)["newer"] == "It is in Rome."
    facts, kept = facts_of(engram, memory), EpisodicMemory.from_pretrained(memory)
    assert (
        facts["atlantis"]["value"] == "Lost." and facts["2"]["text"] == "It is in Rome." and len(facts) == 4
    )
    assert torch.allclose(kept.ledger["atlantis"].key, before.ledger["atlantis"].key, atol=1e-6)
    values = load_encoder("encoder").encode(["Lost.", "It is in Rome."])
    torch.testing.assert_close(kept.ledger["atlantis"].value, values[:1], rtol=0, atol=1e-6)
    torch.testing.assert_close(kept.ledger["2"].key, values[1:], rtol=0, atol=1e-6)
    before = content(memory)
    refused(engram("update", memory, "x"), "--id: expected an --id or a --text, got neither")
    refused(
        engram("update", memory, "x", "--id", "1", "--text", "y"), "--id: expected an --id or a --text, got"
    )
    refused(engram("update", memory, " ", "--id", "1"), "fact: expected some text, got none")
    refused(engram("update", memory, "x", "--id", "9"), "--id: expected a fact of the memory, as it lists it")
    assert content(memory) == before


def test_users_have_memories_of_their_own(engram, tmp_path):
    place = tmp_path / "m"
    write(engram, place, tmp_path, "The Prado is in Madrid.\n", "--user", "ann", "--encoder", "encoder")
    write(engram, place, tmp_path, "The Prado is in Paris.\n", "--user", "bob")
    write(engram, place, tmp_path, "The Prado is in Rome.\n")
    for options, text in ((("--user", "bob"), "Paris"), (("--user", "ann"), "Madrid"), ((), "Rome")):
        (fact,) = ask(engram, place, "The Prado is in Lyon.", *options)["facts"]
        assert fact["text"] == f"The Prado is in {text}."
    facts = facts_of(engram, place)
    assert {name: fact["user"] for name, fact in facts.items()} == {"1": "ann", "2": "bob", "3": None}
    assert list(facts_of(engram, place, "--user", "bob")) == ["2"]
    _, out, _ = engram("list", place)
    assert "ann, bob" in out and "user" in out
    alone = EpisodicMemory(32, 32, ridge="loo")
    alone.write(load_encoder("encoder").encode(["The Prado is in Paris."]), ids=[1])
    torch.testing.assert_close(
        EpisodicMemory.from_pretrained(place).cross[1], alone.cross[0], rtol=0, atol=1e-6
    )
    before = content(place)
    refused(
        engram("forget", place, "--id", "2"), "--id: expected a fact of the memory, as it lists it, got '2'"
    )
    refused(
        engram("forget", place, "--id", "2", "--user", "eve"), "--user: expected one of the memory's ('ann', "
    )
    (tmp_path / "taken").write_text('{"value": "x", "id": 2}')
    refused(
        engram("write", place, "--facts", tmp_path / "taken"), "--facts: expected a new id in line 1, got '2'"
    )
    assert content(place) == before
    assert engram("forget", place, "--id", "2", "--user", "bob")[0] == 0
    assert list(facts_of(engram, place)) == ["1", "3"]


def test_tags(engram, tmp_path):
    place = tmp_path / "m"
    text = '{"value": "The Prado is in Madrid.", "tags": ["art", "spain"]}\nThe Louvre is in Paris.\n'
    write(engram, place, tmp_path, text, "--tag", "museums", "--tag", "art", "--encoder", "encoder")
    assert facts_of(engram, place)["1"]["tags"] == ["art", "spain", "museums"]
    assert list(facts_of(engram, place, "--tag", "spain", "--tag", "art")) == ["1"]
    assert [fact["id"] for fact in ask(engram, place, "The Prado", "--tag", "spain")["facts"]] == ["1"]
    status, out, _ = engram("ask", place, "x", "--tag", "none")
    assert status == 0 and "There is no such fact." in out
    _, out, _ = engram("list", place)
    assert "museums, art" in out
    engram("update", place, "--id", "1", "x")
    assert facts_of(engram, place)["1"]["tags"] == ["art", "spain", "museums"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_files_of_any_unicode_encoding(engram, tmp_path, encoding):
    (tmp_path / "facts").write_bytes("Der Prado ist schön.\r\n\r\nプラド美術館\r".encode(encoding))
    engram("write", tmp_path / "m", "--facts", tmp_path / "facts", "--encoder", "encoder")
    texts = [fact["text"] for fact in facts_of(engram, tmp_path / "m").values()]
    assert texts == ["Der Prado ist schön.", "プラド美術館"]


def test_the_encodings_error_names_the_line(engram, tmp_path):
    (tmp_path / "facts").write_bytes("A fact.\nAnother.\n".encode("utf-16") + b"\x00\xd8")
    message = "--facts: expected UTF-8, or UTF-16 or UTF-32 with a byte order mark, got"
    result = engram("write", tmp_path / "m", "--facts", tmp_path / "facts", "--encoder", "encoder")
    refused(result, message)
    assert "whose line 3 is not UTF-16" in result[2]
    result = engram("write", tmp_path / "m", "--facts", "latin", "--encoder", "encoder")
    refused(result, message)
    assert "whose line 2 is not UTF-8" in result[2] and not (tmp_path / "m").exists()


def test_a_long_fact_is_one_fact(engram, tmp_path):
    story, place = "Paris is the capital of France. " * 60, tmp_path / "m"
    (tmp_path / "facts").write_text(f"{story}Rome.\n{story}Madrid.\n")
    assert engram("write", place, "--facts", tmp_path / "facts", "--encoder", "encoder")[0] == 0
    first, second = (fact for fact in facts_of(engram, place).values())
    assert first["rows"] == second["rows"] > 5 and first["text"] == f"{story}Rome."
    kept = EpisodicMemory.from_pretrained(place)
    assert not torch.equal(kept.ledger["1"].value[-1], kept.ledger["2"].value[-1])
    for command in (("ask", place, "Rome."), ("list", place)):
        _, out, _ = engram(*command)
        assert len(out.splitlines()) < 30 and "…" in out
    assert engram("forget", place, "--id", "1")[0] == 0
    assert EpisodicMemory.from_pretrained(place).count.tolist() == [second["rows"]]
    (tmp_path / "keyed").write_text(json.dumps({"key": "What?", "value": story}))
    assert engram("write", place, "--facts", tmp_path / "keyed", "--encoder", "encoder")[0] == 0
    assert ask(engram, place, "What?")["facts"][0]["key"] == "What?"


def test_a_memory_that_is_nearly_full_says_so_and_grows(engram, tmp_path):
    (tmp_path / "facts").write_text("".join(f"The museum number {i} is in Paris.\n" for i in range(8)))
    place = tmp_path / "m"
    arguments = ("--facts", tmp_path / "facts", "--encoder", "encoder", "--slots", "8")
    status, out, err = engram("write", place, *arguments)
    assert status == 0 and err.startswith("Warning: memory: 8 rows in 8 slots: ") and "grow" in err
    before = EpisodicMemory.from_pretrained(place)
    status, out, err = engram("grow", place, "--slots", "32")
    assert (status, err) == (0, "") and "32 slots, and had 8" in out
    kept = EpisodicMemory.from_pretrained(place)
    assert kept.slots == 32 and kept.ids == before.ids and kept.ledger["8"].text == before.ledger["8"].text
    for slots in ("32", "33", "8"):
        refused(engram("grow", place, "--slots", slots), "--slots: expected 33 to 32, the size of a latent")
    (tmp_path / "more").write_text("".join(f"The tower number {i} is in Rome.\n" for i in range(22)))
    _, _, err = engram("write", place, "--facts", tmp_path / "more")
    assert err.startswith("Warning: memory: 30 rows in 32 slots: ") and "--user" in err


def test_an_encoder_that_was_changed_since_is_refused(engram, folder, tmp_path):
    """Such as one that was trained on: latents of both would be compared, and what is found were chance."""
    encoder, place = tmp_path / "encoder", tmp_path / "m"
    shutil.copytree(folder / "encoder", encoder)
    assert engram("write", place, "--facts", "facts", "--encoder", encoder)[0] == 0
    before = content(place)
    small_encoder(seed=1).save_pretrained(encoder)
    engram("list", place)  # which takes what saving has printed
    message = f"encoder: expected the one that made {str(place)!r}, got {str(encoder)!r}, which makes other"
    refused(engram("write", place, "--facts", "more"), f"--{message}")
    refused(engram("update", place, "--id", "1", "The Louvre is in Oslo."), message)
    refused(engram("ask", place, "Where is the Louvre?"), message)
    assert content(place) == before
    small_encoder().save_pretrained(encoder)
    assert engram("write", place, "--facts", "more")[0] == 0
