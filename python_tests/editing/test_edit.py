"""An edit in words, checked when it is made."""

import pytest

from engram_kernels.editing import Edit


def test_inline_subject_becomes_the_place_holder():
    assert Edit("Rome", "The mayor of Rome is", "Anna") == Edit("Rome", "The mayor of {} is", "Anna")
    assert Edit(" Rome ", "The mayor of Rome is", "Anna").prompt_text == "The mayor of Rome is"


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
