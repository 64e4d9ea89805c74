"""Rows of CounterFact and zsRE, in the layouts in which they go round."""

import json

import pytest
from evaluation_helpers import EASY_EDIT, ROME, ZSRE, ZSRE_EASY_EDIT, without, written

from engram_kernels.editing import Edit
from engram_kernels.evaluation.datasets import Case, Neighbour, read_cases

pytestmark = pytest.mark.usefixtures("one_thread")


def test_easy_edit_rows(tmp_path):
    (case,) = written(tmp_path / "a.json", [EASY_EDIT])
    assert case == Case(
        name="7",
        kind="counterfact",
        edit=Edit("The Louvre", "{} is a museum in", "Rome"),
        truth="Paris",
        paraphrases=("To see The Louvre, go to",),
        neighbours=(Neighbour("The Colosseum is located in the city of", "Italy"),),
    )


def test_rome_rows(tmp_path):
    (case,) = written(tmp_path / "a.json", [ROME])
    assert (case.name, case.kind, case.truth) == ("3", "counterfact", "Paris")
    assert (
        case.edit.prompt_text == "The Eiffel Tower is located in the city of" and case.edit.target == "Rome"
    )
    assert case.paraphrases == tuple(ROME["paraphrase_prompts"])
    assert case.neighbours == tuple((prompt, "Paris") for prompt in ROME["neighborhood_prompts"])
    assert case.generation == tuple(ROME["generation_prompts"])


def test_zsre_rows_of_both_layouts(tmp_path):
    mend, easy = written(tmp_path / "a.json", [ZSRE, ZSRE_EASY_EDIT])
    assert (mend.name, mend.kind, mend.truth) == ("0", "zsre", "Switzerland")
    assert mend.edit == Edit("Zürich", "Which country is {} in?", "Brazil")
    assert mend.paraphrases == ("What is the country of Zürich?",)
    assert mend.neighbours == (("nq question: where are the towers", "on the maps"),)
    assert (easy.name, easy.kind, easy.truth) == ("1", "zsre", "Brazil")
    assert easy.edit == Edit("São Paulo", "Where does {} lie?", "Japan")


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
    "no subject": (
        without(EASY_EDIT, "subject"),
        "data: expected some text under 'subject' in row 1, got none",
    ),
    "no target": (without(EASY_EDIT, "target_new"), "under 'alt' or 'target_new' in row 1, got none"),
    "empty target": ({**ZSRE, "alt": " "}, "under 'alt' or 'target_new' in row 1, got ' '"),
    "no answers": ({**ZSRE, "answers": []}, "under 'answers' or 'ground_truth' in row 1, got []"),
    "no paraphrase": (without(ZSRE, "rephrase"), "under 'rephrase' or 'rephrase_prompt' in row 1, got none"),
    "no neighbour": (without(ZSRE, "loc"), "under 'loc' or 'locality_prompt' in row 1, got none"),
    "rewrite": ({"requested_rewrite": "x"}, "expected an object under 'requested_rewrite' in row 1, got 'x'"),
    "no truth": (
        without(ROME, "requested_rewrite", "target_true"),
        "expected an object under 'requested_rewrite.target_true' in row 1, got none",
    ),
    "no string": (
        without(ROME, "requested_rewrite", "target_new", "str"),
        "expected some text under 'requested_rewrite.target_new.str' in row 1, got none",
    ),
    "no neighbours": ({**ROME, "neighborhood_prompts": []}, "under 'neighborhood_prompts' in row 1, got []"),
    "not texts": ({**ROME, "paraphrase_prompts": [1]}, "under 'paraphrase_prompts' in row 1, got [1]"),
    "answers too few": (
        {**ZSRE, "loc": ["a", "b"]},
        "expected 2 answers under 'loc_ans' or 'locality_ground_truth' in row 1, got ['on the maps']",
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
