"""An edit in words, checked when it is made."""

import dataclasses

import pytest

from engram_kernels.editing import Edit


def test_inline_subject_becomes_the_place_holder():
    assert Edit("Rome", "The mayor of Rome is", "Anna") == Edit("Rome", "The mayor of {} is", "Anna")
    assert Edit(" Rome ", "The mayor of Rome is", "Anna").prompt_text == "The mayor of Rome is"


def test_the_text_is_the_one_that_is_trained():
    assert Edit("Rome", "{} is in", "Italy").text == "Rome is in Italy"
    assert Edit("中国", "{}的首都是", "纽约").text == "中国的首都是纽约"
    assert Edit("Rome", '{} is called "', "Roma").text == 'Rome is called "Roma'
    assert Edit("Rome", "{} is in ", "Italy").text == "Rome is in Italy"
    assert Edit("Rome", "{} is in", "  Italy").text == "Rome is in  Italy"
    assert Edit("walk", "I was {}", "ing", space=False).text == "I was walking"
    assert Edit("中国", "{}的首都是", "纽约", space=True).text == "中国的首都是 纽约"


def test_a_subject_is_whole_words():
    with pytest.raises(ValueError, match=r"^prompt: expected .*'Roman' exactly once, as whole words, got "):
        Edit("Roman", "The capital of Romania is", "Anna")
    assert Edit("Rome", "Romeo of Rome is", "Anna").prompt == "Romeo of {} is"


def test_paraphrases_and_chats():
    edit = Edit("Rome", "{} is in", "Italy", ["Find Rome in", "{} is in", "Find {} in"])
    assert edit.paraphrases == ("Find {} in",) and edit.prompts == ("{} is in", "Find {} in")
    asked = {"role": "user", "content": "Where is Rome?"}
    chat = Edit("Rome", [{"role": "system", "content": "Be short."}, asked], "Italy")
    assert chat.prompt == (("system", "Be short."), ("user", "Where is {}?"))
    assert chat.prompt_text == "Where is Rome?" and chat.text == "Where is Rome?\nItaly"
    assert Edit("Rome", "Where is {}?", "Italy", chat=True).prompt == (("user", "Where is {}?"),)
    assert Edit("Rome", "{} is in", "Italy", [[asked]]).paraphrases == ((("user", "Where is {}?"),),)
    assert len({chat, edit, Edit(**dataclasses.asdict(chat))}) == 2


@pytest.mark.parametrize(
    "arguments, error, word",
    [
        ({"paraphrases": "{} is"}, TypeError, "paraphrases"),
        ({"paraphrases": ["Paris is"]}, ValueError, "paraphrases"),
        ({"paraphrases": [3]}, TypeError, "paraphrases"),
        ({"prompt": []}, ValueError, "prompt"),
        ({"prompt": [{"role": "user"}]}, TypeError, "prompt"),
        ({"prompt": [("user", "Where is Paris?")]}, ValueError, "prompt"),
        ({"space": 1}, TypeError, "space"),
        ({"chat": "yes"}, TypeError, "chat"),
        ({"suffixes": 1}, TypeError, "suffixes"),
    ],
)
def test_bad_options_name_their_argument(arguments, error, word):
    with pytest.raises(error, match=rf"^{word}: expected .*, got "):
        Edit(**{"subject": "Rome", "prompt": "{} is in", "target": "Italy", **arguments})


@pytest.mark.parametrize(
    "subject, prompt, target, error, word",
    [
        ("", "{} is in", "Rome", ValueError, "subject"),
        ("  ", "{} is in", "Rome", ValueError, "subject"),
        ("Tower", "", "Rome", ValueError, "prompt"),
        ("Tower", "{} is in", "", ValueError, "target"),
        ("Tower", "{} is in", " \n", ValueError, "target"),
        ("Tower", "The Louvre is in", "Rome", ValueError, "prompt"),
        ("Tower", "Tower after Tower is in", "Rome", ValueError, "prompt"),
        ("Tower", "{} and {} are in", "Rome", ValueError, "prompt"),
        ("a{}b", "the a{}b is", "c", ValueError, "subject"),
        (None, "{} is in", "Rome", TypeError, "subject"),
        ("Tower", 3, "Rome", TypeError, "prompt"),
        ("Tower", "{} is in", ["Rome"], TypeError, "target"),
    ],
)
def test_bad_edits_name_their_argument(subject, prompt, target, error, word):
    with pytest.raises(error, match=rf"^{word}: expected .*, got ") as caught:
        Edit(subject, prompt, target)
    assert "\n" not in str(caught.value)
