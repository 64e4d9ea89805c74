"""Where a space stands between a prompt and its target, and where a subject stands as whole words."""

import pytest

from engram_kernels.hf.scripts import joint, stands_apart, whole_words


@pytest.mark.parametrize(
    "prompt, target",
    [
        ("The tower is in", "Rome"),
        ("La tour se trouve à", "l'Ouest"),
        ("Башня находится в", "Париже"),
        ("برج إيفل في", "باريس"),
        ("टावर शहर में है।", "रोम"),
        ("서울은", "대한민국에 있다"),
        ("The answer:", "42"),
        ("It costs", "$5"),
        ("Es kostet (heute)", "5 €"),
        ('The word "tower" means', "turris"),
        ("The towers' city is", "Rome"),
        ("It is -", "well"),
        ("The temperature is", "-5"),
        ("x =", "5"),
        ("He said", '"yes"'),
        ("中国 is in", "Asia"),
    ],
)
def test_a_space_where_both_ask_for_one(prompt, target):
    assert joint(prompt, target) == " "


@pytest.mark.parametrize(
    "prompt, target",
    [
        ("中国的首都是", "纽约"),
        ("東京は", "日本にある"),
        ("日本の首都は「", "京都"),
        ("ประเทศไทยมีเมืองหลวงชื่อ", "โรม"),
        ("首都：", "Rome"),
        ("The capital of China is", "北京"),
        ('It stands in the city of "', "Rome"),
        ("It stands in the city of “", "Rome"),
        ("It costs $", "5"),
        ("It costs €", "5"),
        ("print(", "x"),
        ("os.path/", "join"),
        ("It is a non-", "starter"),
        ("The tower is in ", "Rome"),
        ("The tower is in", " Rome"),
        ("The tower is in", "\nRome"),
        ("The tower is tall", ", and old"),
        ("The tower", "'s city"),
        ("It is called @", "tower"),
        ("my_", "name"),
    ],
)
def test_no_space_where_one_does_not(prompt, target):
    assert joint(prompt, target) == ""


def test_the_caller_settles_it():
    assert joint("The word is walk", "ing", False) == ""
    assert joint("中国的首都是", "纽约", True) == " "
    assert joint("The tower is in", "", True) == ""


@pytest.mark.parametrize(
    "prompt, target, apart",
    [
        ("The capital is", "Rome", True),
        ("It costs $", "5", False),
        ("首都是", "纽约", True),
        ("首都是", "Rome", False),
    ],
)
def test_a_word_of_its_own(prompt, target, apart):
    assert stands_apart(prompt, target) is apart
    assert stands_apart(prompt, target, True) and not stands_apart(prompt, target, False)


def test_whole_words():
    assert whole_words("Roman", "The capital of Romania is Roman") == [26]
    assert whole_words("Rome", "Rome, not Romeo: Rome") == [0, 17]
    assert whole_words("中国", "在中国的首都") == [1]
    assert whole_words("C++", "I write C++ daily") == [8]
    assert whole_words("2", "room 12") == []
