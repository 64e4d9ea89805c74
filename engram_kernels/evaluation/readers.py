"""The formats of published data sets, one small function each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..editing.edit import Edit
from ..hf.scripts import whole_words
from .cases import Query, Question, RippleTest
from .fields import Fields

# How RippleEdits and KnowEdit call what should follow from an edit, and what should not change.
FOLLOWS = (
    "Logical_Generalization",
    "Reasoning",
    "Subject_Aliasing",
    "Compositionality_I",
    "Compositionality_II",
)
# The first is how RippleEdits' files spell it.
STAYS = ("Relation_Specifity", "Relation_Specificity", "Forgetfulness")

# Where the subject stands in RippleEdits' sentences.
SENTENCES = (
    r"The .*?which (.+) (?:is associated with|is a member of|is part of|is the capital of|plays in) is",
    r"The number of children (.+) has is",
    r"The name of the award (.+) won is",
    r"The name of the position held by (.+) is",
    r"The name of the (?:currency|anthem that is most likely to be performed) in (.+) is",
    r"The (?:names? of the )?(?:(?:country|place|field|head|date) of \w+|[\w ]+?) of (.+) (?:is|are)",
    r"(.+) (?:is followed by|follows)",
)


class Reader(NamedTuple):
    """A format: its name, the fields that tell it, and the function that reads a row."""

    name: str
    tells: Callable[[Fields], bool]
    read: Callable[[Fields], dict]


def counterfact(fields: Fields) -> dict:
    """ROME's CounterFact: its paraphrases entail the fact, and the neighbours share the true answer."""
    rewrite = fields.within("requested_rewrite")
    truth = rewrite.within("target_true").text("str")
    return {
        "edit": edit(
            rewrite.text("subject"), rewrite.text("prompt"), rewrite.within("target_new").text("str")
        ),
        "truth": truth,
        "paraphrases": fields.texts("paraphrase_prompts"),
        "neighbours": tuple(Question(prompt, truth) for prompt in fields.texts("neighborhood_prompts")),
        "generation": fields.texts("generation_prompts"),
    }


def counterfact_easyedit(fields: Fields) -> dict:
    """EasyEdit's CounterFact, whose `rephrase_prompt` is CounterFact's paraphrase or its generation prompt.

    A paraphrase has other text before it, which ends in a full stop.
    """
    found = edit(fields.text("subject"), fields.text("prompt"), fields.text("target_new"))
    prompts = fields.texts("rephrase_prompt", "rephrase")
    entailing = tuple(prompt for prompt in prompts if re.search(r"[.!?]\s", prompt.split(found.subject)[0]))
    return {
        "edit": found,
        "truth": fields.text("ground_truth"),
        "paraphrases": entailing,
        "neighbours": _pairs(fields, ("locality_prompt",), ("locality_ground_truth",)),
        "generation": tuple(prompt for prompt in prompts if prompt not in entailing),
    }


def zsre_memit(fields: Fields) -> dict:
    """zsRE by MEMIT's protocol: the edit is the right answer, and locality prompts get a question mark."""
    neighbours = _pairs(fields, ("loc",), ("loc_ans",))
    return {
        "edit": edit(fields.text("subject"), fields.text("src"), fields.text("answers")),
        "truth": None,
        "paraphrases": fields.texts("rephrase"),
        "neighbours": tuple(question._replace(prompt=f"{question.prompt}?") for question in neighbours),
    }


def zsre_easyedit(fields: Fields) -> dict:
    """zsRE by EasyEdit's protocol: the edit is a made-up answer."""
    return {
        "edit": edit(fields.text("subject"), fields.text("src", "prompt"), fields.text("alt", "target_new")),
        "truth": fields.text("answers", "ground_truth"),
        "paraphrases": fields.texts("rephrase", "rephrase_prompt"),
        "neighbours": _pairs(fields, ("loc", "locality_prompt"), ("loc_ans", "locality_ground_truth")),
        "portability": _of_lists(fields, "portability_prompt", "portability_ground_truth"),
    }


def knowedit(fields: Fields) -> dict:
    """KnowEdit's WikiData_recent, WikiData_counterfact and ZsRE."""
    truth = fields.answers("ground_truth")[0] if "ground_truth" in fields else None
    return {
        "edit": edit(fields.text("subject"), fields.text("prompt"), fields.text("target_new")),
        "truth": truth,
        "paraphrases": fields.texts("rephrase_prompt", "rephrase"),
        "neighbours": _grouped(fields, "locality"),
        "portability": _grouped(fields, "portability"),
    }


def knowedit_wikibio(fields: Fields) -> dict:
    """KnowEdit's WikiBio: a biography is continued by a sentence."""
    return {
        "edit": edit(fields.text("concept"), fields.text("text"), fields.text("labels")),
        "truth": None,
        "neighbours": _grouped(fields, "locality"),
    }


def cknowedit(fields: Fields) -> dict:
    """CKnowEdit: questions in Chinese, of no named subject."""
    return {
        "edit": edit(None, fields.text("prompt"), fields.text("target_new")),
        "truth": fields.text("target_old"),
        "paraphrases": fields.texts("rephrase"),
        "neighbours": _listed(fields, "locality"),
        "portability": _listed(fields, "portability"),
    }


def mquake(fields: Fields) -> dict:
    """MQuAKE: one fact or several, and questions that need them all."""
    first, *rest = fields.objects("requested_rewrite")
    edits = [
        edit(each.text("subject"), each.text("prompt"), each.within("target_new").text("str"))
        for each in (first, *rest)
    ]
    answer, *aliases = fields.answers("new_answer")
    aliases += fields.texts("new_answer_alias")
    multi_hop = tuple(
        Question(text, answer, "multi-hop", tuple(aliases)) for text in fields.texts("questions")
    )
    others = tuple(
        question
        for each, made in zip(rest, edits[1:], strict=True)
        for question in (
            Question(made.prompt_text, made.target, "further facts"),
            *(Question(text, made.target, "further facts") for text in each.texts("question")),
        )
    )
    hops = tuple(
        Question(hop.text("question"), hop.text("answer"), "single hops", hop.texts("answer_alias"))
        for hop in fields.objects("new_single_hops")
    )
    return {
        "edit": edits[0],
        "further": tuple(edits[1:]),
        "truth": first.within("target_true").text("str"),
        "paraphrases": first.texts("question"),
        "portability": multi_hop + others + hops,
    }


def ripple_edits(fields: Fields) -> dict:
    """RippleEdits: a sentence to learn, and tests by kind, each with what a model must know beforehand."""
    told = fields.within("edit")
    subject, prompt, target = _sentence(told)
    before = told.within("original_fact") if "original_fact" in told else None
    questions = {
        kind: tuple(
            Question(query.text("prompt"), names[0], kind, tuple(names[1:]), found)
            for test in fields.objects(kind)
            for found in [_test(test)]
            for query in test.objects("test_queries")
            if (names := [name for answer in _names(query) for name in answer])
        )
        for kind in (*FOLLOWS, *STAYS)
    }
    return {
        "edit": edit(subject, prompt, target),
        "truth": None if before is None else _sentence(before)[2],
        "neighbours": tuple(question for kind in STAYS for question in questions[kind]),
        "portability": tuple(question for kind in FOLLOWS for question in questions[kind]),
    }


def wiki_big_edit(fields: Fields) -> dict:
    """WikiBigEdit: facts that changed on Wikidata, asked as questions."""
    target = fields.text("ans")
    personas = (Question(text, target, "personas") for text in fields.texts("personas"))
    hops = (
        (Question(fields.text("mhop"), fields.text("mhop_ans"), "multi-hop"),) if "mhop_ans" in fields else ()
    )
    return {
        "edit": edit(fields.text("subject"), fields.text("update"), target),
        "truth": None,
        "paraphrases": fields.texts("rephrase"),
        "neighbours": _pairs(fields, ("loc",), ("loc_ans",)),
        "portability": (*personas, *hops),
    }


def unke(fields: Fields) -> dict:
    """UnKE: a question with a long answer, of no named subject, and questions about its parts."""
    return {
        "edit": edit(None, fields.text("question"), fields.text("answer")),
        "truth": None,
        "paraphrases": fields.texts("para_question"),
        "portability": _of_lists(fields, "sub_question", "sub_answer", "parts"),
    }


def akew(fields: Fields) -> dict:
    """AKEW: CounterFact, MQuAKE or updates of Wikipedia, whose target is a paragraph."""
    rewrite = next(fields.objects("requested_rewrite"))
    subject = rewrite.text("subject")
    triplets = tuple(
        Question(part.text("prompt").replace("{}", part.text("subject")), part.text("target"), "parts")
        for part in rewrite.objects("unsfact_triplets_GPT")
    )
    # Of CounterFact the paraphrases are its own, else the question is one.
    others = fields if "paraphrase_prompts" in fields else rewrite
    old = rewrite.within("target_true").text("str") if "target_true" in rewrite else None
    neighbours = _pairs(fields, ("loc",), ("loc_ans",))
    if "neighborhood_prompts" in fields and old:
        neighbours = tuple(Question(prompt, old) for prompt in fields.texts("neighborhood_prompts"))
    return {
        "edit": edit(subject, rewrite.text("prompt"), rewrite.text("fact_new_uns")),
        "truth": None,
        "paraphrases": others.texts("paraphrase_prompts", "question"),
        "neighbours": neighbours,
        "portability": triplets,
    }


def edit(subject: str | None, prompt: str, target: str) -> Edit:
    """The fact of a row, whose prompt may name its subject more than once: the first time counts.

    Where a data set names no subject, the prompt's last word stands for it: its last token is written at.
    """
    if subject is None:
        start = prompt.rstrip().rfind(" ") + 1
        return Edit(prompt[start:], prompt[:start] + "{}", target)
    places = [] if "{}" in prompt else whole_words(subject, prompt)
    if places:
        prompt = f"{prompt[: places[0]]}{{}}{prompt[places[0] + len(subject) :]}"
    return Edit(subject, prompt, target)


def _is_zsre(fields: Fields) -> bool:
    asked = fields.row.get("locality_prompt")
    first = asked[0] if isinstance(asked, list) and asked else asked
    return isinstance(first, str) and first.startswith("nq question:")


def _long(fields: Fields) -> bool:
    found = fields.row.get("requested_rewrite")
    first = found[0] if isinstance(found, list) and found else found
    return isinstance(first, dict) and "fact_new_uns" in first


def _has(*names: str) -> Callable[[Fields], bool]:
    return lambda fields: all(name in fields.row for name in names)


def _pairs(fields: Fields, prompts: tuple[str, ...], answers: tuple[str, ...]) -> tuple[Question, ...]:
    """Prompts and answers in two lists of one length, or one of each; none at all is allowed."""
    asked, found = fields.texts(*prompts), fields.texts(*answers)
    if len(asked) != len(found):
        fields.refuse(answers, f"{len(asked)} answers", list(found))
    return tuple(map(Question, asked, found))


def _of_lists(fields: Fields, prompts: str, answers: str, group: str = "") -> tuple[Question, ...]:
    return tuple(question._replace(group=group) for question in _pairs(fields, (prompts,), (answers,)))


def _listed(fields: Fields, name: str) -> tuple[Question, ...]:
    """Objects of a prompt and an answer; where one of them is empty, nothing is asked."""
    return tuple(
        Question(each.text("prompt"), answers[0], aliases=answers[1:])
        for each in fields.objects(name)
        if each.row.get("prompt") and (answers := each.answers("answer", "ground_truth"))
    )


def _grouped(fields: Fields, name: str) -> tuple[Question, ...]:
    """KnowEdit's groups of objects, each a prompt and its answers; an empty answer is not asked."""
    if name not in fields:
        return ()
    groups = fields.within(name)
    return tuple(
        Question(each.text("prompt"), answers[0], group, answers[1:])
        for group in groups.row
        for each in groups.objects(group)
        if (answers := _answers(each))
    )


def _answers(fields: Fields) -> tuple[str, ...]:
    value = fields.row.get("ground_truth")
    empty = value is None or value in ("", [], [""], [[]], [[""]])
    return () if empty else fields.answers("ground_truth")


def _test(test: Fields) -> RippleTest:
    """A test of RippleEdits, and what a model is to know for it."""
    asked, known = (
        tuple(Query(query.text("prompt"), _names(query)) for query in test.objects(part))
        for part in ("test_queries", "condition_queries")
    )
    return RippleTest(asked, known, test.row.get("test_condition") == "AND")


def _names(query: Fields) -> tuple[tuple[str, ...], ...]:
    """What each answer of a query of RippleEdits is called: nothing, where its label is missing."""
    return tuple(
        # A single letter counts for nothing.
        tuple(
            name
            for name in (answer.text("value"), *answer.texts("aliases"))
            if len(name) > 1 or name.isdigit()
        )
        if answer.row.get("value") not in (None, "")
        else ()
        for answer in query.objects("answers")
    )


def _sentence(told: Fields) -> tuple[str, str, str]:
    """Subject, prompt and target of RippleEdits' sentence, whose file has the subject by number only."""
    sentence = told.text("prompt").removesuffix(".")
    parts = re.fullmatch(r"(.*\s(?:is followed by|follows|are|is))\s(.+)", sentence)
    subjects = [found for shape in SENTENCES if parts and (found := re.fullmatch(shape, parts[1]))]
    if not subjects:
        told.refuse(("prompt",), "a sentence such as 'The mother tongue of … is ….'", sentence)
    return subjects[0][1], parts[1], parts[2]


# The first whose fields are there reads a row.
READERS = (
    Reader("akew", _long, akew),
    Reader("mquake", lambda fields: isinstance(fields.row.get("requested_rewrite"), list), mquake),
    Reader("counterfact", _has("requested_rewrite"), counterfact),
    Reader("ripple edits", _has("edit", "example_type"), ripple_edits),
    Reader("zsre", _has("src"), zsre_memit),
    Reader("zsre, EasyEdit's", _is_zsre, zsre_easyedit),
    Reader("wikibio", _has("concept", "labels"), knowedit_wikibio),
    Reader("wikibigedit", _has("update", "ans"), wiki_big_edit),
    Reader("unke", _has("question", "answer"), unke),
    Reader("cknowedit", _has("target_old", "target_new"), cknowedit),
    Reader(
        "knowedit",
        lambda fields: any(isinstance(fields.row.get(name), dict) for name in ("locality", "portability")),
        knowedit,
    ),
    Reader("counterfact", _has("target_new", "prompt"), counterfact_easyedit),
)
EASYEDIT_ZSRE = Reader("zsre, EasyEdit's", _has("src"), zsre_easyedit)


def reader(fields: Fields, zsre: str) -> Reader:
    """The format of a row.

    Raises:
        ValueError: it is none that is known; the message has the row's fields.
    """
    readers: Iterator[Reader] = iter((EASYEDIT_ZSRE, *READERS) if zsre == "easyedit" else READERS)
    found = next((each for each in readers if each.tells(fields)), None)
    if found is None:
        names = ", ".join(dict.fromkeys(each.name for each in READERS))
        fields_found = ", ".join(map(repr, fields.row)) or "none"
        raise ValueError(
            f"data: expected a row of a known format ({names}), got the fields {fields_found} in row "
            f"{fields.number}"
        )
    return found
