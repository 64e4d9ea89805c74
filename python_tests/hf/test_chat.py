"""A conversation as the tokens of any model's chat template."""

import pytest
from model_zoo import byte_level_tokenizer

import engram_kernels as ek
from engram_kernels.hf.chat import chat_ids

TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}[assistant]"
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + TURNS
)
DROPS_SYSTEM = TURNS.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
THINKS = TURNS + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": " Who is it?\n"}]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TURNS, "[system]Be short.[user]Who is it?[assistant]"),
        (NO_SYSTEM, "[user]Be short.\n\n Who is it?[assistant]"),
        (DROPS_SYSTEM, "[user]Be short.\n\n Who is it?[assistant]"),
        (THINKS, "[system]Be short.[user]Who is it?[assistant]<think></think>"),
        (None, "Be short.\n\n Who is it?\n\n\n"),
    ],
)
def test_what_a_model_hears(template, expected):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template
    assert (
        chat_ids(tokenizer, MESSAGES) == tokenizer(expected, add_special_tokens=template is None)["input_ids"]
    )


def test_a_template_that_takes_no_messages_is_named():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(
        ek.EngramError, match=r"^tokenizer: expected a chat template that takes a user's message"
    ):
        chat_ids(tokenizer, MESSAGES)
