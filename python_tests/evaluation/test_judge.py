"""A judge of answers: a function or a program; and the hook to lm-evaluation-harness."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from model_zoo import small_model

from engram_kernels import EngramError
from engram_kernels.evaluation.harness import run_tasks
from engram_kernels.evaluation.judge import command_judge, judged
from engram_kernels.evaluation.measures import measure

pytestmark = pytest.mark.usefixtures("one_thread")

ASKED = [{"prompt": "Where?", "answer": "Zürich", "text": f"In {name}."} for name in ("Zürich", "Rome")]
PROGRAM = "import sys, json\nfor line in sys.stdin:\n    row = json.loads(line)\n    print({})"


def program(tmp_path, said):
    path = tmp_path / "judge.py"
    path.write_text(PROGRAM.format(said))
    return f"{sys.executable} -X utf8 {path}"


def test_a_program_judges(tmp_path):
    judge = command_judge(program(tmp_path, "json.dumps(row['answer'] in row['text'])"))
    assert judge(ASKED) == [True, False]


def test_figures_are_judged(tokenizer, cases):
    figures = measure(small_model("llama", len(tokenizer)), tokenizer, cases)
    found = judged(figures, lambda asked: [0.25] * len(asked))
    assert {answer.judged for one in found for answer in one.answers} == {0.25}
    assert [one.aspects for one in found] == [one.aspects for one in figures]
    with pytest.raises(EngramError, match=r"judge: expected \d+ numbers, one an answer, got 1"):
        judged(figures, lambda asked: [1])
    with pytest.raises(EngramError, match="judge: expected numbers from 0 to 1, or true and false, got 7"):
        judged(figures, lambda asked: [7] * len(asked))


def test_programs_that_do_not_judge(tmp_path):
    with pytest.raises(EngramError, match="judge: expected a program, got '/no/such' "):
        command_judge("/no/such --x")(ASKED)
    with pytest.raises(EngramError, match=r"to end well, got status 1: ZeroDivisionError"):
        command_judge(program(tmp_path, "1 / 0"))(ASKED)
    with pytest.raises(EngramError, match="judge: expected a number a line, got other text"):
        command_judge(program(tmp_path, "'yes'"))(ASKED)
    with pytest.raises(ValueError, match="judge: expected a command, got ' '"):
        command_judge(" ")


def test_tasks_of_the_harness(monkeypatch):
    asked = {}

    def simple_evaluate(**options):
        asked.update(options)
        return {"results": {"lambada": {"acc,none": 0.5, "alias": "lambada"}}}

    harness, models = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")
    harness.simple_evaluate, models.HFLM = simple_evaluate, lambda **given: SimpleNamespace(**given)
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    monkeypatch.setitem(sys.modules, "lm_eval.models", ModuleType("lm_eval.models"))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", models)
    assert run_tasks("model", "tokenizer", ["lambada"], limit=3) == {"lambada": {"acc,none": 0.5}}
    assert asked["tasks"] == ["lambada"] and asked["limit"] == 3
    assert (asked["model"].pretrained, asked["model"].tokenizer) == ("model", "tokenizer")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EngramError, match="lm_eval: expected the package lm-eval, which runs its tasks"):
        run_tasks("model", "tokenizer", ["lambada"])
