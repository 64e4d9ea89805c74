"""Sentences from a memory: what is told, what is quoted, and where nothing is known."""

import copy
import warnings

import pytest
import torch
from larimar_helpers import LATENT, sentence_encoder
from model_zoo import byte_level_tokenizer, small_model

from engram_kernels.larimar import Answerer, ReadAloud
from engram_kernels.larimar.answering import UNKNOWN, begin_alike
from engram_kernels.larimar.coverage import coverage, excerpts
from engram_kernels.larimar.grounding import first_sentence, grounded, has_sentence
from engram_kernels.memory import EpisodicMemory
from engram_kernels.memory.recall import STEP

pytestmark = pytest.mark.usefixtures("one_thread")

FACTS = {
    "tower": "The Eiffel Tower is in Rome.",
    "old": "The museum closes at six.",
    "new": "The museum closes at eight.",
    "louvre": "Dr. Berg saw the Louvre, in Paris, at 22:47.",
}


def told(answerer, question, said):
    """An answer for which the model says something given; and what it was told."""
    heard = []
    answerer.say = lambda prompts: [heard.append(text) or said for _, text in prompts]
    return answerer(question), heard


@pytest.fixture
def answerer():
    encoder = sentence_encoder()
    memory = EpisodicMemory(LATENT, LATENT)
    memory.write(encoder.encode(list(FACTS.values())), ids=list(FACTS), texts=list(FACTS.values()))
    return Answerer(memory, encoder, small_model("llama"), byte_level_tokenizer(), max_new_tokens=5)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Dr. Berg left. He ran.", "Dr. Berg left."),
        ("J. S. Bach wrote it! Yes.", "J. S. Bach wrote it!"),
        ('It is "The Lantern." And more.', 'It is "The Lantern."'),
        ("At 22:47 or 1.5 times\nmore. Text", "At 22:47 or 1.5 times"),
        ("終わりです。次", "終わりです。"),
        ("यह पुल है। वह नदी है।", "यह पुल है।"),
        ("هل هذا جسر؟ نعم", "هل هذا جسر؟"),
        ("  no end", "no end"),
    ],
)
def test_a_first_sentence_ends_where_it_does(text, sentence):
    assert first_sentence(text) == sentence
    assert has_sentence(text) == (sentence != text.strip())


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("Marta runs the bakery.", "Marta runs the bakery."),
        ("It is run by Marta, a friendly woman, and so on.", "It is run by Marta."),
        ("It is owned by Marta.", None),
        ("The bakery is Marta's, a friendly woman's, and so on.", "The bakery is Marta's."),
        ("Marta opens it at 7:30.", "Marta opens it at 7:30."),
        ("Marta opens it at 7:45.", None),
        ("Yes.", None),
        ("Marta is Marta.", "Marta is Marta."),
        ("It opens.", None),
        ("...", None),
        ("", None),
    ],
)
def test_what_was_not_told_is_cut_off(said, kept):
    assert grounded(said, "Marta runs the bakery, which opens at 7:30.", "Who opens it?") == kept


def test_a_question_is_covered_as_far_as_its_least_word():
    encoder = sentence_encoder()
    question = "Where is the Louvre museum?"
    whole, other = coverage(encoder, question, [question, "A tower of Brazil."])
    assert whole == pytest.approx(1.0, abs=1e-5) and -1 <= other < whole
    # Beside each other they are padded, which changes nothing; and a question of small words is covered.
    assert coverage(encoder, question, ["A tower of Brazil."]) == pytest.approx([other], abs=1e-5)
    assert coverage(encoder, "What is it?", ["A tower."]) == [1.0] and coverage(encoder, question, []) == []


def test_coverage_is_the_least_of_the_largest_cosines():
    """Of the question's content words: here all of it but for its first word."""
    encoder, question, text = sentence_encoder(), "Where museum towers Paris", "The towers close."
    states = []
    for part in (question, text):
        ids = torch.tensor([encoder.tokenizer(part)["input_ids"]])
        with torch.no_grad():
            found = encoder.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        states.append(torch.nn.functional.normalize(found[1:-1], dim=-1))  # without the marks at both ends
    words = len(encoder.tokenizer("Where")["input_ids"]) - 2
    cosines = (states[0][words:] @ states[1].T).amax(-1)
    assert coverage(encoder, question, [text]) == pytest.approx([float(cosines.min())], abs=1e-6)
    assert cosines.mean() - cosines.min() > 0.01  # else this test shows little


def test_a_long_text_is_told_in_excerpts():
    sentences = [f"Sentence number {i} of a story that is long enough to be cut." for i in range(8)]
    assert excerpts(" ".join(sentences)) == [" ".join(sentences[i : i + 2]) for i in range(7)]
    hindi = [f"यह कहानी का वाक्य {i} है, जो काटने के लिए काफ़ी लंबा है।" for i in range(12)]
    assert excerpts(" ".join(hindi)) == [" ".join(hindi[i : i + 2]) for i in range(11)]
    # A table, and lines without an end or without blanks.
    lines = [f"room {i}, the piano tuner, {i} o'clock" for i in range(40)]
    assert excerpts("\n".join(lines)) == [" ".join(lines[i : i + 2]) for i in range(39)]
    for long in ("nobody knows " * 500, "日" * 5000):
        found = excerpts(long)
        assert all(len(excerpt) <= 801 for excerpt in found) and len(found) > 10
        assert "".join("".join(found[::2]).split()) in "".join(long.split())
    assert excerpts("Short. It is. Really.") == ["Short. It is. Really."] and excerpts("x" * 500) == [
        "x" * 500
    ]


def test_the_model_is_told_the_best_fact_alone(answerer):
    question = "The Eiffel Tower is in"
    answer, heard = told(answerer, question, "It is in Rome, of all places.")
    assert heard == [f"{FACTS['tower']}\n\n{question}"]
    assert (answer.text, answer.source) == ("It is in Rome.", "memory")
    best = answer.facts[0]
    assert best.recalled.name == "tower"
    assert [best.coverage] == pytest.approx(coverage(answerer.encoder, question, [FACTS["tower"]]), abs=1e-5)
    assert best.score == (best.recalled.score + best.coverage) / 2
    assert {fact.recalled.name for fact in answer.facts} == set(FACTS)


def test_a_fact_is_quoted_where_the_model_says_what_it_was_not_told(answerer):
    for said in ("It is in Oslo.", "It is the tower.", ""):
        answer, _ = told(answerer, "The Eiffel Tower is in", said)
        assert (answer.text, answer.source) == (FACTS["tower"], "quote")


def test_of_facts_that_begin_alike_the_newest_counts(answerer):
    for name in ("old", "new"):
        assert answerer.recall(FACTS[name])[0].recalled.name == "new"
    assert begin_alike("The doctor is Henrik Vale.", "The doctor is Priya Raman, who came in May.")
    assert not begin_alike("The doctor of the town", "The dentist of the town")
    assert not begin_alike("He is", "He is")


def test_forgetting_a_fact_leaves_other_answers_alone(answerer):
    questions = [FACTS["tower"], FACTS["louvre"]]
    before = [told(answerer, question, "Oslo.")[0].text for question in questions]
    answerer.memory.forget(ids=["tower"])
    after = [told(answerer, question, "Oslo.")[0] for question in questions]
    assert before == list(FACTS[name] for name in ("tower", "louvre"))
    assert after[1].text == before[1] and after[0].text != before[0]


def test_nothing_is_known_of_what_is_far_or_not_covered(answerer, monkeypatch):
    asked = answerer.absent()
    assert answerer.memory.threshold() == pytest.approx(asked + STEP * (1 - asked))
    monkeypatch.setattr("engram_kernels.larimar.answering.coverage", lambda *_: [-1.0])
    answer, heard = told(answerer, FACTS["tower"], "Rome.")
    assert (answer.text, answer.source, heard) == (UNKNOWN, "nothing", [])
    monkeypatch.undo()
    monkeypatch.setattr(answerer, "absent", lambda: 1.1)
    assert told(answerer, FACTS["tower"], "Rome.")[0].source == "nothing"


def test_the_model_answers_alone_only_if_it_may(answerer):
    answerer.memory = EpisodicMemory(LATENT, LATENT)
    answer, heard = told(answerer, "What is it?", "A thing.")
    assert (answer.text, answer.source, answer.facts, heard) == ("A thing.", "model", [], ["What is it?"])
    answerer.alone = False
    answer, heard = told(answerer, "What is it?", "A thing.")
    assert (answer.text, answer.source, heard) == (UNKNOWN, "nothing", [])


def test_of_a_fact_with_a_key_the_value_is_told(answerer):
    key, value = "Where is the Louvre?", "In Paris."
    latents = answerer.encoder.encode([value, key])
    known = [{"key": key, "value": value}]
    answerer.memory.write(latents[:1], latents[1:], ["keyed"], [f"{key} → {value}"], known)
    answer, heard = told(answerer, key, "In Paris, France.")
    assert (answer.text, answer.source, heard) == ("In Paris.", "memory", [f"{value}\n\n{key}"])


def test_each_user_has_answers_of_their_own():
    encoder = sentence_encoder()
    memory = EpisodicMemory(LATENT, LATENT, batch=2)
    for number, fact in enumerate(("The tower is in Rome.", "The tower is in Oslo.")):
        memory.write(encoder.encode([fact]), ids=[number], texts=[fact], memory=number)
    for number, city in enumerate(("Rome", "Oslo")):
        mine = Answerer(memory, encoder, small_model("llama"), byte_level_tokenizer(), number=number)
        answer, _ = told(mine, f"The tower is in {city}.", "Madrid.")
        assert answer.text == f"The tower is in {city}." and len(answer.facts) == 1
    none = Answerer(
        memory, encoder, small_model("llama"), byte_level_tokenizer(), where=lambda *_: False, number=0
    )
    assert told(none, "The tower is in Rome.", "So.")[0].source == "model"


def test_another_encoder_than_the_memorys_is_warned_of(answerer):
    memory, encoder = EpisodicMemory(LATENT, LATENT, encoder="minilm"), copy.copy(answerer.encoder)
    others = memory, encoder, answerer.decoder, answerer.tokenizer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Answerer(*others)  # without a name it may be the same one
        encoder.name = "minilm"
        Answerer(*others)
    encoder.name = "bge"
    for kind in (Answerer, ReadAloud):
        with pytest.warns(
            UserWarning, match="^encoder: expected 'minilm', which made the memory's latents, got"
        ):
            kind(*others)


def test_an_empty_question_is_refused(answerer):
    with pytest.raises(ValueError, match="question: expected some text"):
        answerer("  ")
    with pytest.raises(TypeError, match=r"^questions: expected a list of texts, got one text$"):
        answerer.answer("Why?")


@torch.no_grad()
def test_what_the_model_says_is_what_it_generates(answerer):
    ids = torch.tensor([answerer.tokenizer("Be short.\n\nWhere is the tower?\n\n")["input_ids"]])
    written = answerer.decoder.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[
        0, ids.shape[1] :
    ]
    said = answerer.tokenizer.decode(written, skip_special_tokens=True)
    # Beside another, longer prompt too.
    prompts = [("Be short.", "Where is the tower?"), ("Be long.", "Where is the tower of Rome? In Paris?")]
    assert answerer.say(prompts)[0] == answerer.say(prompts[:1])[0] == first_sentence(said)


def test_questions_are_answered_together_as_alone(answerer):
    answerer.alone = False
    questions = ["The Eiffel Tower is in", "The museum closes at", "Why?"]
    answerer.say = lambda prompts: [text for _, text in prompts]
    assert answerer.answer(questions) == [answerer(question) for question in questions]
