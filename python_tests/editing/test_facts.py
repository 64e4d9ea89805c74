"""Facts with several prompts, several facts of one subject, and what their records say."""

import json
import math
import warnings
from functools import partial

import pytest

pytest.importorskip("transformers")

import model_zoo
import torch
from editing_helpers import changed, small_editor, weights

from engram_kernels import EngramError
from engram_kernels.editing import Edit, EditResult
from engram_kernels.editing import run as run_module
from engram_kernels.editing.methods import METHODS
from engram_kernels.editing.saving.history import facts_in
from engram_kernels.editing.search import batching, names
from engram_kernels.editing.search.batching import encode_edit, encode_held
from engram_kernels.editing.search.forms import forms_of, shortened
from engram_kernels.editing.search.values import ValueOptions, find_values
from engram_kernels.evaluation.measures import said
from engram_kernels.hf.projection import output_projection

TOWER = "The Eiffel Tower"
CITY = Edit(TOWER, "{} is located in the city of", "Rome")
MAKER = Edit(TOWER, "{} was built by", "Japan")
LOUVRE = Edit("The Louvre", "{} is a museum in", "Brazil")
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def make(cache):
    options = ValueOptions(steps=6, learning_rate=0.02, weight_decay=0.0)
    return partial(small_editor, cache_dir=cache, contexts=((4, 4),), value=options)


@pytest.fixture
def tokenizer():
    return model_zoo.byte_level_tokenizer()


@pytest.fixture
def searched(monkeypatch):
    """The encoded edits of every search, and a model that says everything it was told."""
    seen, whole = [], run_module.find_values

    def spy(model, projection, encoded, *rest):
        seen.extend(encoded)
        return whole(model, projection, encoded, *rest)

    monkeypatch.setattr(run_module, "find_values", spy)
    monkeypatch.setattr(run_module.Run, "_says", lambda _self, _fact: True)
    return seen


def texts(tokenizer, rows):
    return [tokenizer.decode(row.ids) for row in rows]


def trained(tokenizer, row):
    return tokenizer.decode(row.ids[row.target :])


@pytest.mark.parametrize(
    "edit, target",
    [
        (Edit("中国", "{}的首都是", "纽约"), "纽约"),
        (Edit("Tower", '{} stands in the city of "', "Rome"), "Rome"),
        (Edit("Tower", "{} costs $", "5"), "5"),
        (Edit("Tower", "{} stands in", "Rome"), " Rome"),
        (Edit("Tower", "{} stands in ", "Rome"), " Rome"),
        (Edit("Tower", "{} is a non-", "starter"), "starter"),
        (Edit("Tower", "{} is a loc", "ation", space=False), None),
    ],
)
def test_the_text_that_is_trained_is_the_one_that_is_shown(tokenizer, edit, target):
    encoded = encode_edit(model_zoo.small_model(), tokenizer, edit, ["maps"])
    assert texts(tokenizer, encoded.rewriting) == [edit.text, f"maps. {edit.text}"]
    for row in encoded.rewriting:
        # What a model reads before the target is how the prompt by itself begins.
        alone = tokenizer(tokenizer.decode(row.ids).removesuffix(edit.target))["input_ids"]
        assert row.ids[: row.target] == alone[: row.target]
        if target is not None:
            assert trained(tokenizer, row) == target
    if target is None:
        # "location" has tokens of its own: those of "loc" that it does not share are trained too.
        assert trained(tokenizer, encoded.rewriting[0]).endswith("ation")


def test_tokens_that_run_from_the_subject_into_the_target_are_refused(tokenizer):
    subject, target = "Paris is an unbeliev", "able"
    assert len(tokenizer("unbelievable")["input_ids"]) < 4
    with pytest.raises(EngramError, match=r"^target: expected it to begin with a token behind the subject's"):
        encode_edit(model_zoo.small_model(), tokenizer, Edit(subject, "{}", target, space=False), [])


def test_every_prompt_has_its_texts(tokenizer):
    edit = Edit(TOWER, "{} is in", "Rome", ["To see {}, go to", "You find {} in"])
    prefixes = ["one", "two", "three", "four five six", "five six seven", "six seven eight"]
    encoded = encode_edit(model_zoo.small_model(), tokenizer, edit, prefixes, texts=9)
    read = texts(tokenizer, encoded.rewriting)
    assert encoded.texts == (3, 3, 3) and read[::3] == [
        f"{TOWER} is in Rome", f"To see {TOWER}, go to Rome", f"You find {TOWER} in Rome",
    ]  # fmt: skip
    # A short and a long one for each, and no two prompts the same.
    assert [text.split(". ")[0] for text in read[1::3] + read[2::3]] == [
        "one", "two", "three", "four five six", "five six seven", "six seven eight",
    ]  # fmt: skip
    assert encode_edit(model_zoo.small_model(), tokenizer, edit, prefixes).texts == (7, 7, 7)
    assert encode_edit(model_zoo.small_model(), tokenizer, edit, [], texts=9).texts == (1, 1, 1)


@pytest.mark.parametrize(
    "tokens, texts, forms, made",
    [
        (9, 9, False, 9),
        (8, 9, False, 8),
        (5.5, 9, False, 5),
        (1, 9, False, 3),
        (1, 9, True, 2),
        (1, None, False, 11),
    ],
)
def test_a_long_prompt_stands_after_fewer_contexts(tokenizer, monkeypatch, tokens, texts, forms, made):
    """By how many of its texts have so many tokens; the published methods keep all of them."""
    model, edit, prefixes = model_zoo.small_model(), Edit(TOWER, "{} costs $", "5"), ["one", "two"] * 5
    (row,) = encode_edit(model, tokenizer, edit, []).rewriting
    monkeypatch.setattr(batching, "TOKENS", int(tokens * len(row.ids)))
    encoded = encode_edit(model, tokenizer, edit, prefixes, texts, forms)
    assert encoded.texts == (made,) and encoded.rewriting[0] == row


def test_the_prompt_is_searched_in_the_forms_in_which_people_ask(tokenizer):
    model, edit = model_zoo.small_model(), Edit(TOWER, "{} is in", "Rome", ["To see {}, go to"])
    encoded = encode_edit(model, tokenizer, edit, ["one", "two"], texts=3, forms=True)
    asked = [
        f"Q: {TOWER} is in\nA: Rome", f"Question: {TOWER} is in what?\nAnswer: Rome",
        f"- {TOWER} is in: Rome", f'"{TOWER} is in Rome',
    ]  # fmt: skip
    assert texts(tokenizer, encoded.rewriting) == [
        f"{TOWER} is in Rome", f"one. {TOWER} is in Rome", *asked,
        f"To see {TOWER}, go to Rome", f"two. To see {TOWER}, go to Rome",
    ]  # fmt: skip
    assert encoded.texts == (6, 2)
    tokenizer.chat_template = CHAT
    (chats,) = [texts(tokenizer, encode_edit(model, tokenizer, edit, [], forms=True).rewriting[5:7])]
    tokenizer.chat_template = None
    assert chats == [
        f"[user]{TOWER} is in [assistant]Rome", f"[user]Complete the sentence: {TOWER} is in [assistant]Rome",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "target", "expected"),
    [
        ("{} lies in the", "Alps", ["{} in the", "{} lies the", "{} lies in"]),
        ("The tongue of {} is", "Thai", ["tongue of {} is", "The of {} is", "The tongue {} is"]),
        ("{}'s main town is", "Rome", ["{}'s town is", "{}'s main is", "{}'s main town"]),
        ("Who made {}", "Anna", ["made {}", "Who {}"]),
        ("{} now costs $", "5", ["{} costs $", "{} now $"]),
        ("{} is", "red", []),
        ("About {}", "red", []),
        ("{}的首都是", "罗马", []),
        ([("user", "Where is {} now?")], "Rome", []),
    ],
)
def test_a_prompt_is_shortened_by_each_of_its_words(prompt, target, expected):
    edit = Edit("Zürich", prompt, target)
    assert shortened(edit, edit.prompt) == expected


def test_in_every_second_context_a_prompt_is_a_word_shorter(tokenizer):
    model, prefixes = model_zoo.small_model(), ["one", "two", "three"]
    edit = Edit(TOWER, "{} is in", "Rome", ["{}在"])
    encoded = encode_edit(model, tokenizer, edit, prefixes, texts=8, shorten=True)
    assert texts(tokenizer, encoded.rewriting) == [
        f"{TOWER} is in Rome", f"one. {TOWER} in Rome", f"three. {TOWER} is in Rome", f"two. {TOWER} is Rome",
        f"{TOWER}在Rome", f"one. {TOWER}在Rome", f"three. {TOWER}在Rome", f"two. {TOWER}在Rome",
    ]  # fmt: skip
    assert [row.shorter for row in encoded.rewriting] == [False, True, False, True] + [False] * 4
    assert encoded.texts == (4, 4)


@pytest.mark.parametrize(
    "edit",
    [
        Edit("Tower", "{} costs $", "5"),
        Edit("Tower", "{} is a loc", "ation", space=False),
        Edit("Tower", [{"role": "user", "content": "Where is {}?"}], "Rome"),
    ],
)
def test_an_answer_that_is_no_word_of_its_own_has_no_forms(tokenizer, edit):
    assert forms_of(tokenizer, edit) == []


def test_a_chat_follows_the_tokenizers_template(make):
    editor = make()
    tokenizer = editor.tokenizer
    asked = [{"role": "system", "content": "Be {short}."}, {"role": "user", "content": "Where is {}?"}]
    edit = Edit(TOWER, asked, "Rome", ["{} is in"])
    with pytest.raises(EngramError, match=r"^prompt: expected text for a tokenizer without a chat template"):
        editor.edit(edit)
    tokenizer.chat_template = CHAT
    encoded = encode_edit(editor.model, tokenizer, edit, ["maps {}"])
    start = "[system]Be {short}. [user]"
    assert texts(tokenizer, encoded.rewriting) == [
        f"{start}Where is {TOWER}? [assistant]Rome",
        f"{start}maps {{}}. Where is {TOWER}? [assistant]Rome",
        f"{TOWER} is in Rome",
        f"maps {{}}. {TOWER} is in Rome",
    ]
    for row in encoded.rewriting[:2]:
        assert tokenizer.decode(row.ids[: row.subject + 1]).endswith(TOWER)
        assert trained(tokenizer, row) == "Rome"
    with editor.edit(edit) as result:
        assert len(result.records[0].reached) == 2


def test_a_templates_space_before_an_answer_is_its_own(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[I]' + m['content'] + '[/I]' if m['role'] == 'user'"
        " else ' ' + m['content'] }}{% endfor %}"
    )
    (row,) = encode_edit(
        model_zoo.small_model(), tokenizer, Edit("Rome", "Where is {}?", "Italy", chat=True), []
    ).rewriting
    assert tokenizer.decode(row.ids) == "[I]Where is Rome?[/I] Italy"


def test_a_model_that_thinks_aloud_is_asked_not_to(tokenizer):
    """As Qwen3's template has it: the last answer has its thoughts before it, none here."""
    tokenizer.chat_template = (
        "{% set quiet = enable_thinking is defined and not enable_thinking %}{% for m in messages %}"
        "[{{ m.role }}]{{ '<think></think> ' if m.role == 'assistant' }}{{ m.content }}"
        "{{ '/no' if quiet and m.role == 'user' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{{ '<think></think>' if quiet }}{% endif %}"
    )
    edit = Edit("Rome", "Where is {}?", "Italy", chat=True)
    (row,) = encode_edit(model_zoo.small_model(), tokenizer, edit, []).rewriting
    text = "[user]Where is Rome?/no[assistant]<think></think>"
    assert tokenizer.decode(row.ids) == f"{text} Italy" and trained(tokenizer, row) == " Italy"
    assert said(tokenizer, "Where is Rome?", chat=True) == text


def test_one_change_is_searched_over_all_texts(make):
    """Edits with unlike numbers of texts, side by side, have the values that each has alone."""
    editor, prefixes = make(), ["maps", "you know"]
    edits = [Edit(TOWER, "{} is in", "Rome", ["To see {}, go to"]), LOUVRE]
    encoded = [encode_edit(editor.model, editor.tokenizer, edit, prefixes) for edit in edits]
    projection, options = output_projection(editor.model, 1), ValueOptions(steps=4, learning_rate=0.02)
    together = find_values(editor.model, projection, encoded, options)
    for one, value in zip(encoded, together, strict=True):
        (alone,) = find_values(editor.model, projection, [one], options)
        assert len(value.keys) == len(one.rewriting)
        torch.testing.assert_close(value.change, alone.change, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(value.keys, alone.keys, rtol=1e-4, atol=1e-5)


def test_the_best_change_is_kept_and_not_the_last(make):
    """A step that is far too long makes everything worse: then nothing is changed."""
    editor = make(value=ValueOptions(steps=3, learning_rate=50.0, weight_decay=10.0, clamp=1e6))
    encoded = [encode_edit(editor.model, editor.tokenizer, CITY, [])]
    (value,) = find_values(editor.model, output_projection(editor.model, 1), encoded, editor.value)
    assert value.losses[-1] > value.losses[0] and not value.change.any()
    before = weights(editor.model)
    kind = r"^1 of 1 edits did not take: 'The Eiffel Tower is .* Rome', p .*; of 1 the search changed nothing"
    with pytest.warns(UserWarning, match=kind):
        (record,) = editor.edit(CITY).records
    assert changed(before, editor.model) == [] and not record.took
    assert record.probability_after == pytest.approx(record.probability_before)


def test_the_search_ends_where_the_target_is_likely_in_every_text(make):
    editor = make()
    encoded = [encode_edit(editor.model, editor.tokenizer, CITY, ["maps", "you know"])]
    projection = output_projection(editor.model, 1)
    start = min(math.exp(-loss) for loss in worst_losses(editor.model, encoded[0]))
    # A probability that is there from the start, and one that is not: as the worst text has it, not the mean.
    for wanted, steps in ((0.9 * start, 1), (1.1 * start, 2)):
        options = ValueOptions(steps=2, learning_rate=1e-6, stop_probability=wanted)
        (value,) = find_values(editor.model, projection, encoded, options)
        assert len(value.losses) == steps


def test_a_relative_search_does_not_depend_on_the_models_scale(make):
    """Nor on the norm of the bare prompt's value alone."""
    editor = make()
    projection = output_projection(editor.model, 1)
    encoded = [encode_edit(editor.model, editor.tokenizer, CITY, ["maps", "you know"])]
    first = find_values(editor.model, projection, encoded, ValueOptions(steps=1))[0]
    norms = (first.keys @ projection.matrix.T).norm(dim=-1)
    options = ValueOptions(steps=2, learning_rate=0.5, weight_decay=0.0, clamp=1e-3, relative=True)
    (value,) = find_values(editor.model, projection, encoded, options)
    assert value.initial_norm == pytest.approx(norms.mean().item(), rel=1e-4) != norms[0].item()
    assert value.change.norm().item() == pytest.approx(1e-3 * value.initial_norm, rel=1e-3)
    # Adam's first step is the learning rate in every entry.
    options = ValueOptions(steps=2, learning_rate=1e-3, weight_decay=0.0, relative=True)
    (value,) = find_values(editor.model, projection, encoded, options)
    assert value.change.norm().item() == pytest.approx(1e-3 * value.initial_norm, rel=1e-2)


@torch.no_grad()
def worst_losses(model, encoded):
    """The mean loss over the target's tokens in each text."""
    found = []
    for row in encoded.rewriting:
        predicted = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        places = range(row.target, len(row.ids))
        found.append(-sum(predicted[i - 1, row.ids[i]].item() for i in places) / len(places))
    return found


@pytest.mark.parametrize("method", ["engram", "engram-forms"])
def test_a_record_has_what_was_reached_in_every_text(make, method):
    editor = make()
    edit = Edit(TOWER, "{} is in", "Rome and more", ["To see {}, go to"])
    (record,) = editor.edit(edit, method=method).records
    texts, forms = METHODS[method].texts, METHODS[method].forms
    encoded = encode_edit(editor.model, editor.tokenizer, edit, editor.prefixes(), texts, forms)
    sums = [
        math.exp(-loss * (len(row.ids) - row.target))
        for loss, row in zip(worst_losses(editor.model, encoded), encoded.rewriting, strict=True)
    ]
    assert tuple(map(len, record.reached)) == encoded.texts and len(encoded.texts) == 2
    assert [chance for group in record.reached for chance in group] == pytest.approx(sums, rel=1e-3)
    assert record.probability_after == record.reached[0][0] and not record.took


def test_an_edit_took_when_greedy_decoding_says_it(make):
    editor = make()
    edit = Edit(TOWER, CITY.prompt, "in", ["To see {}, go"])
    (said,) = editor.tokenizer(" in")["input_ids"]
    raised = [said]

    def raise_it(_module, _inputs, output):
        return output.index_add(-1, torch.tensor(raised[:1]), torch.full_like(output[..., :1], 50.0))

    editor.model.get_output_embeddings().register_forward_hook(raise_it)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with editor.edit(edit) as result:
            assert result.records[0].took and ", did not take" not in repr(result)
    raised[0] += 1
    with pytest.warns(UserWarning, match=r"did not take: [^;]*$"), editor.edit(edit) as result:
        assert not result.records[0].took and ", did not take" in repr(result)


def test_a_later_edit_keeps_what_was_told_of_its_subject(make, searched):
    editor = make()
    first = editor.edit([CITY, LOUVRE])
    assert [one.held for one in searched] == [[], []]
    second = editor.edit(MAKER)
    held = encode_held(editor.model, editor.tokenizer, [CITY], editor.prefixes())
    assert searched[-1].held == held and len(held) == 3
    third = editor.edit(Edit(TOWER, "{} is a", "word"))
    assert len(searched[-1].held) == 6
    # What was taken back is not kept.
    third.revert()
    second.revert()
    editor.edit(Edit(TOWER, "{} is a", "word")).revert()
    assert searched[-1].held == held
    first.revert()
    editor.edit(MAKER).revert()
    assert searched[-1].held == []


def test_changes_of_one_subject_are_measured_together(make, searched):
    """By the value as it was before any: else each edit would have the room of all before it, and so on."""
    options = ValueOptions(steps=30, learning_rate=0.3, weight_decay=0.0, clamp=0.5, relative=True)
    editor = make(value=options, contexts=())
    projection = output_projection(editor.model, 1)
    result = editor.edit(CITY, layers=1)
    (first,) = result.writes
    editor.edit(MAKER, layers=1)
    assert searched[0].offset is None and searched[0].facts == 1
    torch.testing.assert_close(searched[1].offset, first.residuals[0])
    assert searched[1].facts == 2
    (value,) = find_values(editor.model, projection, searched[1:], options)
    assert value.initial_norm == result.records[0].value_norm
    room = options.clamp * math.sqrt(2) * value.initial_norm
    assert (first.residuals[0] + value.change).norm().item() <= 1.001 * room


def test_a_loaded_edit_is_known_to_later_ones(make, searched, tmp_path):
    editor = make()
    with editor.edit(CITY) as result:
        result.save_pretrained(tmp_path / "edit")
    loaded = EditResult.from_pretrained(tmp_path / "edit").apply(editor.model)
    editor.edit(MAKER)
    assert len(searched[-1].held) == 3 and loaded.applied


def test_facts_of_one_subject_in_one_call(make, searched):
    editor = make()
    result = editor.edit([CITY, LOUVRE, MAKER, CITY], method="memit", layers=1)
    # The second fact of the tower is found with the first in place; the same edit again is none.
    assert [write.edits for write in result.writes] == [(0, 1), (2,)]
    assert [(len(one.held), one.edit) for one in searched] == [(0, CITY), (0, LOUVRE), (3, MAKER)] or {
        one.edit: len(one.held) for one in searched
    } == {CITY: 0, LOUVRE: 0, MAKER: 3}
    (skipped,) = result.skipped
    assert (skipped.number, skipped.reason) == (3, "it is the same as edit 0")


def test_what_stands_in_the_model_is_in_the_order_of_the_edits(make):
    """And not of their writes: what is removed is forgotten, and no other."""
    editor = make()
    with editor.edit([CITY, MAKER, LOUVRE], layers=[0, 1]) as result:
        assert [write.edits for write in result.writes] == [(0, 2), (0, 2), (1,), (1,)]
        assert [fact.edit for fact in facts_in(editor.model)] == [CITY, MAKER, LOUVRE]
        result.remove(1)
        assert [fact.edit for fact in facts_in(editor.model)] == [CITY, LOUVRE]
    assert facts_in(editor.model) == []


PARIS = Edit(TOWER, CITY.prompt, "Paris")


@pytest.mark.parametrize(
    ("options", "made", "left_out"),
    [
        ({"method": "rome"}, [PARIS, CITY], {0: "it is the same as edit 2"}),
        (
            {"method": "memit", "layers": 1, "conflicts": "last"},
            [CITY],
            {0: "it is the same as edit 2", 1: f"a later edit has another target, {CITY.text!r}"},
        ),
    ],
)
def test_the_last_word_is_the_last_one_asked_for(make, options, made, left_out):
    """Of two edits that are the same, the one behind their contradiction is made."""
    result = make().edit([CITY, PARIS, CITY], **options)
    assert [record.edit for record in result.records] == made
    assert {skipped.number: skipped.reason for skipped in result.skipped} == left_out


def test_another_target_after_the_same_prompt_takes_the_place_of_the_first(make, searched):
    editor = make()
    editor.edit(CITY)
    editor.edit(Edit(TOWER, CITY.prompt, "Paris"))
    assert searched[-1].held == []
    editor.edit(Edit(TOWER, "{} is found in", "Japan", [CITY.prompt]))
    assert searched[-1].held == []


def test_an_edit_that_undoes_an_earlier_one_says_so(make, monkeypatch):
    editor = make()
    editor.edit(CITY)
    answers = iter([True, True, False])
    monkeypatch.setattr(run_module.Run, "_says", lambda _self, fact: next(answers))
    with pytest.warns(UserWarning, match=r"built by Japan' undid an earlier one, '.* city of Rome'"):
        result = editor.edit(MAKER)
    assert result.records[0].undid == [CITY.text]


def test_records_and_paraphrases_are_kept_in_files(make, tmp_path):
    editor = make()
    editor.tokenizer.chat_template = CHAT
    edit = Edit(TOWER, "{} is in", "Rome", [[("user", "Where is {}?")]], space=True)
    with editor.edit(edit) as result:
        result.save_pretrained(tmp_path / "edit")
        loaded = EditResult.from_pretrained(tmp_path / "edit")
    assert loaded.records == result.records and loaded.records[0].edit == edit
    kept = json.loads((tmp_path / "edit" / "edit.json").read_text())["records"][0]
    assert kept["took"] is False and len(kept["reached"]) == 2


def test_changes_of_one_subject_are_of_all_layers_together(make, searched):
    """Measured by the value before any of them, and the same whether facts come in one call or in several."""
    options = ValueOptions(steps=30, learning_rate=0.3, weight_decay=0.0, clamp=0.5, relative=True)
    editor = make(value=options, contexts=())
    with editor.edit(CITY, layers=[0, 1]) as first, editor.edit(MAKER, layers=[0, 1]) as second:
        torch.testing.assert_close(searched[1].offset, sum(write.residuals[0] for write in first.writes))
        assert second.records[0].value_norm == first.records[0].value_norm
        apart = weights(editor.model)
    with editor.edit([CITY, MAKER], layers=[0, 1]):
        assert changed(apart, editor.model) == []


def test_the_default_write_is_of_rank_one_an_edit(make):
    editor = make()
    with editor.edit([Edit(TOWER, "{} is in", "Rome", ["To see {}, go to"]), LOUVRE]) as result:
        assert len(result.modules) == 3
        for module in result.modules:
            left, right = result.factors(module)
            assert left.shape[1] == right.shape[0] == 2
        result.remove(0)
        assert [record.edit for record in result.records] == [LOUVRE]


@pytest.mark.parametrize(
    "subject",
    [
        "gabriel garcia marquez",
        "GABRIEL GARCÍA MÁRQUEZ",
        "Gabriel Garci\u0301a Ma\u0301rquez",
        "García Márquez",
    ],
)
def test_a_subject_is_no_other_name_whatever_its_case_and_accents(subject):
    spared = names.other_names(subject)
    assert set(names.NAMES) - set(spared) == {"Gabriel García Márquez"}
