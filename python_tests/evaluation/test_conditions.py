"""RippleEdits' conditions and tests: what is asked, and what passes, against texts written one by one."""

from dataclasses import replace

import pytest
import torch
from evaluation_helpers import stub
from model_zoo import small_model

from engram_kernels.editing import Edit
from engram_kernels.evaluation.cases import Case, Query, Question, RippleTest
from engram_kernels.evaluation.conditions import answers, settled, with_passes
from engram_kernels.evaluation.measures import measure
from engram_kernels.evaluation.outcomes import Outcome, summarise
from engram_kernels.evaluation.run import Evaluation

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["The Louvre is", "Rome lies in", "A tower of"]


@pytest.fixture(scope="module")
def model(tokenizer):
    return small_model("llama", len(tokenizer))


@pytest.fixture(scope="module")
def texts(model, tokenizer):
    """What the model writes after each prompt, by a loop, to the length of the published runner."""
    found = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        while len(ids) < len(prompt) + 30:
            with torch.no_grad():
                ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
        found[prompt] = tokenizer.decode(ids)
    return found


def known(prompt, texts):
    """A query that the model answers: by its second answer's second name, and by the end of the text."""
    text = texts[prompt]
    return Query(prompt, ((text[-3:],), ("none such", text[len(prompt) : len(prompt) + 4])))


def unknown(prompt, texts):
    return Query(prompt, ((texts[prompt][-3:],), ("none such",)))


def test_a_query_wants_all_answers_by_any_name(model, tokenizer, texts):
    queries = [make(prompt, texts) for prompt in PROMPTS for make in (known, unknown)]
    found = answers(model, tokenizer, queries, batch_size=2)
    assert [found[query] for query in queries] == [True, False] * 3
    # The prompt itself is part of the text, and no name at all is never given.
    said, nothing, empty = Query(PROMPTS[0], (("Louvre",),)), Query(PROMPTS[0], ((),)), Query(PROMPTS[0], ())
    found = answers(model, tokenizer, [said, nothing, empty])
    assert (found[said], found[nothing], found[empty]) == (True, False, True)


def case_of(texts, tests, target="Paris"):
    questions = [
        Question(query.prompt, "Rome", "Reasoning", (), test) for test in tests for query in test.queries
    ]
    edit = Edit("The Louvre", "{} is", target)
    return Case("1", "ripple edits", edit, None, portability=tuple(questions))


def test_only_what_the_model_knows_enough_for_is_asked(model, tokenizer, texts):
    yes, no = (make(PROMPTS[1], texts) for make in (known, unknown))
    asked = Query("Near Rome is", (("Italy",),))
    tests = [RippleTest((asked,), conditions) for conditions in ((), (yes,), (no,), (yes, no))]
    case = case_of(texts, tests)
    (found,) = settled(model, tokenizer, [case])
    assert found == replace(case, portability=case.portability[:2])


def test_a_test_passes_by_one_query_or_by_all(model, tokenizer, texts):
    yes, no = known(PROMPTS[1], texts), unknown(PROMPTS[2], texts)
    tests = [RippleTest((no, yes)), RippleTest((no, yes), every=True), RippleTest((yes,)), RippleTest((no,))]
    target = texts[PROMPTS[0]][-4:]
    for edit, said in ((target, True), ("nowhere", False)):
        case = case_of(texts, tests, edit.strip() or "x")
        (plain,) = measure(model, tokenizer, [case])
        (found,) = with_passes(model, tokenizer, [case], [plain])
        assert [answer.passed for answer in found.answers] == [
            edit.strip() in texts[PROMPTS[0]] and said, True, None, False, None, True, False,
        ]  # fmt: skip
        # Of an edit that is not said nothing is counted but that.
        aspects = summarise([Outcome("1", "", found, found)])["aspects"]
        assert aspects["prompt"]["passed"] == {"unedited": said, "edited": said}
        counted = aspects["portability: Reasoning"].get("passed")
        assert counted == ({"unedited": 0.5, "edited": 0.5} if said else None)


@pytest.mark.parametrize("mode", ["each", "together"])
def test_a_run_asks_the_same_before_and_after(tokenizer, texts, mode):
    yes, no = known(PROMPTS[1], texts), unknown(PROMPTS[1], texts)
    case = case_of(texts, [RippleTest((yes,), (yes,)), RippleTest((yes,), (no,))])
    evaluation = Evaluation(stub(tokenizer, scale=0.5), fluency_tokens=0)
    found = getattr(evaluation, mode)([case])
    (outcome,) = found[0] if mode == "together" else found
    asked = [[answer.prompt for answer in state.answers] for state in (outcome.before, outcome.after)]
    assert asked == [[PROMPTS[0], PROMPTS[1]]] * 2
    assert [answer.passed is None for answer in outcome.after.answers] == [False, False]
    assert outcome.before.answers[1].passed is True
