"""Measures against brute force: a loop over tokens, without batches."""

from dataclasses import replace

import pytest
import torch
from evaluation_helpers import KNOWEDIT, MQUAKE, written
from model_zoo import small_model

from engram_kernels import EngramError
from engram_kernels.evaluation.answers import greedy, success
from engram_kernels.evaluation.measures import MORE_TOKENS, Answer, Figures, measure, questions

pytestmark = pytest.mark.usefixtures("one_thread")


def brute_force(model, tokenizer, prompt, answer):
    """Mean log-probability of the answer, its tokens and the likeliest, alone, by a loop over tokens."""
    prefix = tokenizer(prompt)["input_ids"]
    tokens = tokenizer(f"{prompt} {answer}")["input_ids"][len(prefix) :]
    total, likeliest = 0.0, []
    for i, token in enumerate(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([prefix + tokens[:i]])).logits[0, -1].double()
        total += (logits[token] - logits.logsumexp(0)).item()
        likeliest.append(logits.argmax().item())
    return total / len(tokens), tokens, likeliest


def share(tokens, likeliest):
    return sum(a == b for a, b in zip(tokens, likeliest, strict=True)) / len(tokens)


def figures_of(model, tokenizer, case, **options):
    (found,) = measure(model, tokenizer, [case], **options)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_measures_are_those_of_brute_force(tokenizer, cases, family):
    model = small_model(family, len(tokenizer), torch.float64)
    for case, figures in zip(cases, measure(model, tokenizer, cases, batch_size=5), strict=True):
        asked = questions(case)
        assert [(one.aspect, one.prompt, one.right) for one in figures.answers] == [one[:3] for one in asked]
        for one, question in zip(figures.answers, asked, strict=True):
            mine, tokens, likeliest = brute_force(model, tokenizer, question.prompt, question.right)
            theirs, *_ = brute_force(model, tokenizer, question.prompt, question.other)
            # The logits come as fp64 and are rounded to fp32 once.
            bound = 8 * torch.finfo(torch.float32).eps * (abs(mine) + abs(theirs))
            assert abs(one.log_probability - mine) <= bound and abs(one.margin - (mine - theirs)) <= bound
            assert one.tokens == share(tokens, likeliest) and one.argmax == (tokens == likeliest)
            assert one.likeliest == likeliest
            (written,) = greedy(model, tokenizer, [question.prompt], len(tokens) + MORE_TOKENS)
            assert (one.first, one.text) == (written.first, written.text)
            found = success(written.text, question.right)
            assert (one.begins, one.contains, one.exact) == (found.begins, found.contains, found.exact)


def test_what_is_asked_of_a_case(tmp_path):
    (case, hops) = written(tmp_path / "a.json", [KNOWEDIT, MQUAKE])
    assert [(one.aspect, one.right, one.other) for one in questions(case)] == [
        ("prompt", "Oslo", None),
        ("portability: Reasoning", "Norway", None),
        ("portability: Subject_Aliasing", "Oslo", None),
        ("locality: Relation_Specificity", "female", "Oslo"),
        ("locality: Forgetfulness", "London", "Oslo"),
    ]
    assert [one.aspect for one in questions(hops)] == [
        "prompt", "paraphrase", *["portability: multi-hop"] * 2, *["portability: further facts"] * 2,
        "portability: single hops",
    ]  # fmt: skip


def test_a_chat_is_asked_by_its_template(tokenizer, cases, monkeypatch):
    model = small_model("llama", len(tokenizer))
    with pytest.raises(EngramError, match="chat: expected a tokenizer with a chat template, got one without"):
        figures_of(model, tokenizer, cases[0], chat=True)
    template = "{% for message in messages %}The {{ message.content }} of{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    said = replace(cases[0], edit=replace(cases[0].edit, prompt=f"The {cases[0].edit.prompt} of"))
    chat, plain = figures_of(model, tokenizer, cases[0], chat=True), figures_of(model, tokenizer, said)
    assert chat.answers[0].text == plain.answers[0].text
    assert chat.answers[0].log_probability == pytest.approx(plain.answers[0].log_probability, abs=1e-5)
    assert chat.answers[0].prompt == cases[0].prompt


def answer(aspect="locality", **fields):
    values = {
        "prompt": "x", "right": "y", "text": "y", "first": 1, "begins": True, "contains": True,
        "exact": False, "overlap": 1.0, "argmax": True, "tokens": 1.0, "likeliest": [1, 2],
        "log_probability": -1.0, "margin": 0.5,
    }  # fmt: skip
    return Answer(aspect=aspect, **values | fields)


def test_the_means_of_one_case():
    before = Figures([answer("prompt", margin=None, begins=False), answer(), answer(likeliest=[3])])
    after = Figures([answer("prompt", margin=None), answer(margin=-1.0, first=2), answer(likeliest=[4])])
    assert before.aspects == ["prompt", "locality"] and len(before.of("locality")) == 2
    assert (before.mean("prompt", "begins"), after.mean("prompt", "begins")) == (0, 1)
    assert (before.likelier("locality"), after.likelier("locality")) == (1, 0.5)
    assert before.likelier("prompt") is None and before.mean("prompt", "judged") is None
    kept = after.kept(before, "locality")
    assert kept == {"first_token_kept": 0.5, "text_kept": 1, "tokens_kept": 0.5}


def test_what_cannot_be_measured(tokenizer, cases):
    model = small_model("llama", len(tokenizer))
    long = replace(cases[0], paraphrases=("word " * 200,))
    with pytest.raises(
        EngramError, match=r"prompt: expected at most 128 tokens with the answer, .* got \d{3} in"
    ):
        measure(model, tokenizer, [cases[1], long])
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(EngramError, match=r"model: expected finite predictions after .*, got nan"):
        measure(model, tokenizer, cases)
