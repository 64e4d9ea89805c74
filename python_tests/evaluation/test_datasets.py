"""Rows in the formats in which data sets are published, made up here."""

import codecs
import gzip
import json

import pytest
from evaluation_helpers import EASY_EDIT, KNOWEDIT, MQUAKE, ROME, ZSRE, ZSRE_EASY_EDIT, without, written

from engram_kernels.editing import Edit
from engram_kernels.evaluation import Case, Question, read_cases
from engram_kernels.evaluation.cases import Query, RippleTest

pytestmark = pytest.mark.usefixtures("one_thread")

FURTHER = "Goethe was born in"


def test_easy_edit_s_counterfact(tmp_path):
    entailing = {**EASY_EDIT, "rephrase_prompt": "It rained all day. The Louvre stands in"}
    plain, true = written(tmp_path / "a.json", [EASY_EDIT, entailing])
    assert plain == Case(
        name="7",
        kind="counterfact",
        edit=Edit("The Louvre", "{} is a museum in", "Rome"),
        truth="Paris",
        neighbours=(Question("The Colosseum is located in the city of", "Italy"),),
        generation=("To see The Louvre, go to",),
    )
    assert true.paraphrases == ("It rained all day. The Louvre stands in",) and true.generation == ()


def test_rome_s_counterfact(tmp_path):
    (case,) = written(tmp_path / "a.json", [ROME])
    assert (case.name, case.kind, case.truth) == ("3", "counterfact", "Paris")
    assert case.edit == Edit("The Eiffel Tower", "{} is located in the city of", "Rome")
    assert case.paraphrases == tuple(ROME["paraphrase_prompts"])
    assert case.neighbours == tuple(Question(prompt, "Paris") for prompt in ROME["neighborhood_prompts"])
    assert case.generation == tuple(ROME["generation_prompts"])


def test_zsre_by_both_protocols(tmp_path):
    memit, named = written(tmp_path / "a.json", [ZSRE, ZSRE_EASY_EDIT])
    # MEMIT edits the right answer, and asks the unrelated question with a question mark.
    assert memit.edit == Edit("Zürich", "Which country is {} in?", "Switzerland") and memit.truth is None
    assert memit.neighbours == (Question("nq question: where are the towers?", "on the maps"),)
    assert memit.paraphrases == ("What is the country of Zürich?",)
    mend, easy = written(tmp_path / "a.json", [ZSRE, ZSRE_EASY_EDIT], zsre="easyedit")
    assert mend.edit == Edit("Zürich", "Which country is {} in?", "Brazil") and mend.truth == "Switzerland"
    assert mend.neighbours == (Question("nq question: where are the towers", "on the maps"),)
    assert easy == named and easy.edit == Edit("São Paulo", "Where does {} lie?", "Japan")
    assert (easy.name, easy.truth) == ("1", "Brazil") and {mend.kind, easy.kind} == {"zsre, EasyEdit's"}
    with pytest.raises(ValueError, match="zsre: expected one of memit, easyedit, got 'mend'"):
        read_cases(tmp_path / "a.json", zsre="mend")


def test_knowedit(tmp_path):
    recent, counterfact = written(tmp_path / "a.json", [KNOWEDIT, {**KNOWEDIT, "ground_truth": "Rome"}])
    assert recent.truth is None and counterfact.truth == "Rome" and recent.kind == "knowedit"
    assert recent.edit == Edit("Ada Lovelace", "The place of birth of {} is", "Oslo")
    # Answers are texts, lists, or lists of names for each; an empty one is not asked.
    assert recent.portability == (
        Question("The country where Ada Lovelace was born is", "Norway", "Reasoning"),
        Question("Lady Lovelace was born in", "Oslo", "Subject_Aliasing", ("Christiania", "OSL")),
    )
    assert recent.neighbours == (
        Question("The gender of Ada Lovelace is", "female", "Relation_Specificity"),
        Question("Ada Lovelace also lived in", "London", "Forgetfulness"),
    )


def test_knowedit_s_zsre_and_wikibio(tmp_path):
    zsre = {
        "subject": "Zürich",
        "prompt": "Which country is Zürich in?",
        "target_new": "Brazil",
        "ground_truth": ["Switzerland"],
        "rephrase_prompt": "Where is Zürich?",
        "locality": {"Relation_Specificity": []},
        "portability": {"Reasoning": [{"prompt": "Zürich's continent is", "ground_truth": "America"}]},
    }
    wikibio = {
        "concept": "ada lovelace",
        "text": "A text about ada lovelace. People read of ada lovelace in books.",
        "labels": "She wrote the first program.",
        "locality": {"Relation_Specificity": [{"prompt": "ada lovelace wrote", "ground_truth": ["notes"]}]},
    }
    first, second = written(tmp_path / "a.json", [zsre, wikibio])
    assert first.paraphrases == ("Where is Zürich?",) and first.neighbours == ()
    assert first.portability[0].group == "Reasoning" and first.kind == "knowedit"
    # The first time that the text names its subject is where it stands.
    assert second.edit == Edit(
        "ada lovelace",
        "A text about {}. People read of ada lovelace in books.",
        "She wrote the first program.",
    )
    assert second.kind == "wikibio" and second.neighbours[0].answer == "notes" and second.truth is None


def test_mquake(tmp_path):
    (case,) = written(tmp_path / "a.json", [MQUAKE])
    assert case.edits == (
        Edit("Hamlet", "{} was written by", "Goethe"),
        Edit("Goethe", "{} was born in", "Lima"),
    )
    assert (case.name, case.truth, case.paraphrases) == ("11", "Shakespeare", ("Who wrote Hamlet?",))
    hops = [Question(text, "Lima", "multi-hop", ("Lima, Peru",)) for text in MQUAKE["questions"]]
    facts = [Question(text, "Lima", "further facts") for text in (FURTHER, "Where was Goethe born?")]
    single = Question("Who wrote Hamlet?", "Goethe", "single hops", ("J. W. Goethe",))
    assert case.portability == (*hops, *facts, single) and case.neighbours == ()


def query(prompt, *values, subject="Q1"):
    answers = [{"value": value, "aliases": [f"old {value}"] if value else []} for value in values]
    return {"prompt": prompt, "answers": answers, "query_type": "regular", "subject_id": subject}


def ripple_test(*queries, conditions=(), kind="OR"):
    return {"test_queries": list(queries), "test_condition": kind, "condition_queries": list(conditions)}


def test_ripple_edits(tmp_path):
    known = query("The capital of Peru is", "Lima", subject="Q2")
    row = {
        "example_type": "popular",
        "edit": {
            "prompt": "The name of the country of citizenship of Duke of Nowhere is Peru.",
            "subject_id": "Q1",
            "original_fact": {"prompt": "The name of the country of citizenship of Duke of Nowhere is Chad."},
        },
        "Relation_Specifity": [ripple_test(query("The gender of Duke of Nowhere is", "male"))],
        "Logical_Generalization": [
            ripple_test(
                query("The mother tongue of Duke of Nowhere is", "Spanish", "Q"),
                query("The currency is", ""),
                kind="AND",
            )
        ],
        "Compositionality_I": [ripple_test(query("The capital is", "Lima"), conditions=[known])],
        "Subject_Aliasing": [],
        "Compositionality_II": [ripple_test(query("Nothing is"))],
        "Forgetfulness": [],
    }
    (case,) = written(tmp_path / "a.json", [row])
    assert case.edit == Edit("Duke of Nowhere", "The name of the country of citizenship of {} is", "Peru")
    assert case.truth == "Chad" and case.kind == "ripple edits"
    (gender,) = case.neighbours
    assert gender[:4] == ("The gender of Duke of Nowhere is", "male", "Relation_Specifity", ("old male",))
    assert [(each.group, each.answer) for each in case.portability] == [
        ("Logical_Generalization", "Spanish"),
        ("Compositionality_I", "Lima"),
    ]
    # All answers are wanted, each by a name of more than a letter; one without a label is never given.
    tongue = Query("The mother tongue of Duke of Nowhere is", (("Spanish", "old Spanish"), ("old Q",)))
    logical, capital = (question.test for question in case.portability)
    assert logical == RippleTest((tongue, Query("The currency is", ((),))), (), every=True)
    capital_of = Query("The capital of Peru is", (("Lima", "old Lima"),))
    assert capital == RippleTest((Query("The capital is", (("Lima", "old Lima"),)),), (capital_of,))
    assert case.tests == (gender.test, logical, capital)


@pytest.mark.parametrize(
    ("sentence", "subject", "target"),
    [
        ("The name of the mother of Ada of York is Eve.", "Ada of York", "Eve"),
        ("The names of the siblings of Ada are Eve.", "Ada", "Eve"),
        ("The place of birth of Ada is Rome.", "Ada", "Rome"),
        ("The name of the country which Rome is associated with is Italy.", "Rome", "Italy"),
        ("The name of the sports team which Ada is a member of is Ajax.", "Ada", "Ajax"),
        ("The number of children Ada has is 3.", "Ada", "3"),
        ("The name of the currency in Peru is Sol.", "Peru", "Sol"),
        ("The name of the position held by Ada is Queen.", "Ada", "Queen"),
        ("Part Two is followed by Part Three.", "Part Two", "Part Three"),
        ("Part Two follows Part One.", "Part Two", "Part One"),
    ],
)
def test_the_subject_of_ripple_edits_sentences(tmp_path, sentence, subject, target):
    row = {"example_type": "recent", "edit": {"prompt": sentence, "subject_id": "Q1"}}
    (case,) = written(tmp_path / "a.json", [row])
    assert (case.edit.subject, case.edit.target) == (subject, target)
    assert f"{case.edit.prompt} {target}.".replace("{}", subject) == sentence


def test_wiki_big_edit(tmp_path):
    row = {
        "tag": "new",
        "subject": "Zürich",
        "update": "Who governs Zürich?",
        "rephrase": "Who is the head of Zürich?",
        "personas": "Ahoy, who be ruling Zürich?",
        "ans": 1848,
        "loc": "Who governs Rome?",
        "loc_ans": "Nobody",
        "mhop": "Where was the one who governs Zürich born?",
        "mhop_ans": "Bern",
    }
    whole, bare = written(
        tmp_path / "a.json", [row, {**row, "mhop": None, "mhop_ans": None, "loc": None, "loc_ans": None}]
    )
    # A number is a target like any other.
    assert whole.edit == Edit("Zürich", "Who governs {}?", "1848") and whole.paraphrases == (row["rephrase"],)
    assert whole.portability == (
        Question("Ahoy, who be ruling Zürich?", "1848", "personas"),
        Question("Where was the one who governs Zürich born?", "Bern", "multi-hop"),
    )
    assert whole.neighbours == (Question("Who governs Rome?", "Nobody"),)
    assert bare.neighbours == () and len(bare.portability) == 1


def test_unke_and_akew(tmp_path):
    unke = {
        "id": 5,
        "question": "What did Ada Lovelace do?",
        "answer": "She wrote notes on a machine, and a program.",
        "para_question": "What is Ada Lovelace known for?",
        "sub_question": ["Which texts did she write?"],
        "sub_answer": ["notes"],
    }
    rewrite = {
        "subject": "Ada",
        "prompt": "{} was born in",
        "prompt_full": "Ada was born in",
        "target_new": {"str": "Oslo"},
        "target_true": {"str": "London"},
        "fact_new_uns": "Ada was born in Oslo, in a small house.",
        "unsfact_triplets_GPT": [{"subject": "house", "prompt": "The {} was", "target": "small"}],
        "question": "Where was Ada born?",
    }
    counterfact = {
        "requested_rewrite": rewrite,
        "paraphrase_prompts": ["Ada's birthplace is"],
        "neighborhood_prompts": ["Eve was born in"],
    }
    update = {"requested_rewrite": [rewrite], "loc": "Where is Rome", "loc_ans": "Italy"}
    long, akew, mquake = written(tmp_path / "a.json", [unke, counterfact, update])
    # No subject is named: the prompt's last word stands for it.
    assert long.edit == Edit("do?", "What did Ada Lovelace {}", unke["answer"]) and long.name == "5"
    assert long.paraphrases == ("What is Ada Lovelace known for?",)
    assert long.portability == (Question("Which texts did she write?", "notes", "parts"),)
    assert akew.edit == Edit("Ada", "{} was born in", rewrite["fact_new_uns"]) == mquake.edit
    assert akew.paraphrases == ("Ada's birthplace is",) and mquake.paraphrases == ("Where was Ada born?",)
    assert akew.neighbours == (Question("Eve was born in", "London"),)
    assert mquake.neighbours == (Question("Where is Rome", "Italy"),)
    assert akew.portability == (Question("The house was", "small", "parts"),) and akew.kind == "akew"


def test_cknowedit(tmp_path):
    row = {
        "prompt": "请解释如下成语：画蛇添足",
        "target_old": "错误",
        "target_new": "多此一举",
        "rephrase": ["画蛇添足是什么意思？"],
        "portability": [{"prompt": "用画蛇添足造句", "answer": "他画蛇添足。"}],
        "locality": [{}],
    }
    (case,) = written(tmp_path / "a.json", [row])
    assert (case.edit.prompt_text, case.edit.target, case.truth) == (row["prompt"], "多此一举", "错误")
    assert case.paraphrases == ("画蛇添足是什么意思？",) and case.neighbours == ()
    assert case.portability == (Question("用画蛇添足造句", "他画蛇添足。"),)


def test_a_case_that_is_told_more_keeps_how_its_target_is_written():
    edit = Edit("Rooma", "{} on maassa", "Italia", space=True, suffixes=True)
    case = Case("1", "counterfact", edit, None, paraphrases=("{} sijaitsee", "{} kuuluu"), further=(edit,))
    told = case.told(1, chat=True)
    assert told.paraphrases == ("{} kuuluu",) and len(told.edit.paraphrases) == 1
    for one in (told.edit, *told.further):
        assert one.space and one.suffixes and one.prompt == (("user", "{} on maassa"),)


def test_an_unknown_format_is_told_by_its_fields(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"data: expected a row of a known format \(akew, .*\), got the fields 'fact', 'o' in row 0",
    ):
        written(tmp_path / "a.json", [{"fact": "x", "o": "y"}])


def test_json_lines_and_slices(tmp_path):
    rows = [{**EASY_EDIT, "case_id": i, "locality_ground_truth": "a\u2028b"} for i in range(6)]
    array, lines = tmp_path / "rows.json", tmp_path / "rows.jsonl"
    written(array, rows)
    lines.write_text(
        "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8-sig"
    )
    assert read_cases(array) == read_cases(lines)
    assert [case.name for case in read_cases(lines, 2, 3).cases] == ["2", "3", "4"]
    assert [case.name for case in read_cases(array, 4, 30).cases] == ["4", "5"]
    for start in (-1, 6):
        with pytest.raises(ValueError, match=f"start: expected from 0 to 5, the last row, got {start}"):
            read_cases(array, start)
    with pytest.raises(ValueError, match="rows: expected at least 1, got 0"):
        read_cases(array, 0, 0)


BAD_ROWS = {
    "no subject": (without(EASY_EDIT, "subject"), "expected some text under 'subject' in row 1, got none"),
    "no target": ({**EASY_EDIT, "target_new": True}, "some text under 'target_new' in row 1, got True"),
    "empty target": ({**ZSRE, "answers": " "}, "expected some text under 'answers' in row 1, got ' '"),
    "no answers": ({**ZSRE, "answers": []}, "expected some text under 'answers' in row 1, got []"),
    "rewrite": ({"requested_rewrite": "x"}, "expected an object under 'requested_rewrite' in row 1, got 'x'"),
    "no truth": (
        without(ROME, "requested_rewrite", "target_true"),
        "expected an object under 'requested_rewrite.target_true' in row 1, got none",
    ),
    "no string": (
        without(ROME, "requested_rewrite", "target_new", "str"),
        "expected some text under 'requested_rewrite.target_new.str' in row 1, got none",
    ),
    "not texts": ({**ROME, "paraphrase_prompts": [{}]}, "under 'paraphrase_prompts' in row 1, got [{}]"),
    "answers too few": (
        {**ZSRE, "loc": ["a", "b"]},
        "expected 2 answers under 'loc_ans' in row 1, got ['on the maps']",
    ),
    "no objects": (
        {**KNOWEDIT, "portability": {"Reasoning": ["x"]}},
        "expected objects under 'portability.Reasoning' in row 1, got 'x'",
    ),
    "a hop without an answer": (
        {**MQUAKE, "new_single_hops": [{"question": "x"}]},
        "expected some text under 'new_single_hops[0].answer' in row 1, got none",
    ),
    "no sentence": (
        {"example_type": "x", "edit": {"prompt": "Hello."}},
        "expected a sentence such as 'The mother tongue of … is ….' under 'edit.prompt' in row 1",
    ),
    "subject not in the prompt": (
        {**EASY_EDIT, "subject": "Rome"},
        "data: row 1: prompt: expected {} or the",
    ),
    "no object": (["x"], "data: expected an object in row 1, got list"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, name):
    row, message = BAD_ROWS[name]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([EASY_EDIT, row, ROME]))
    with pytest.raises(ValueError) as raised:
        read_cases(path)
    assert message in str(raised.value) and str(raised.value).startswith("data: ")
    cases, refused = read_cases(path, skip_bad=True)
    assert [case.name for case in cases] == ["7", "3"] and refused == [str(raised.value)]
    with pytest.raises(ValueError, match="data: expected rows that can be read, got none: data: "):
        read_cases(path, 1, 1, skip_bad=True)


def test_files_that_hold_no_rows(tmp_path):
    for content, message in (
        (b"", "data: expected rows in .*, got none"),
        (b"[]", "data: expected rows in .*, got none"),
        (b'[{"a": 1}', "data: expected JSON in .*, got"),
        (b'{"a": 1}\n\nx\n', "data: expected JSON in line 3 of .*, got 'x'"),
        (b"\xff\xfe\xff", "data: expected a file of rows, got .*"),
    ):
        path = tmp_path / "rows"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_cases(path)
    with pytest.raises(ValueError, match=r"data: expected a file of rows, got .*No such file"):
        read_cases(tmp_path / "none")


@pytest.mark.parametrize("lines", [False, True], ids=["array", "lines"])
def test_files_as_other_systems_write_them(tmp_path, lines):
    """In any encoding that the first bytes name, lines that end as on Windows, compression: the same rows."""
    rows = [ROME, {**EASY_EDIT, "target_new": "東京"}]
    written = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\r\n".join(written) + "\r\n" if lines else f"[{','.join(written)}]"
    plain = text.encode()
    expected = read_cases_of(tmp_path, plain)
    assert len(expected) == 2
    encoded = [text.encode(name) for name in ("utf-8-sig", "utf-16", "utf-32")]
    encoded += [codecs.BOM_UTF16_BE + text.encode("utf-16-be"), plain.replace(b"\n", b"\r\n"), plain]
    for content in (*encoded, *map(gzip.compress, encoded)):
        assert read_cases_of(tmp_path, content) == expected
    for content in (
        gzip.compress(plain)[:40],
        gzip.compress(plain)[:10] + b"other",
        text.encode("utf-16")[:-1],
    ):
        with pytest.raises(ValueError, match=r"^data: expected a file of rows, got .*rows"):
            read_cases_of(tmp_path, content)


def read_cases_of(folder, content):
    (folder / "rows").write_bytes(content)
    return read_cases(folder / "rows").cases
