"""Prompts of a conversation, as a model was taught to read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import EngramError


def chat_ids(tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The tokens of a conversation up to where the model is to speak.

    By the tokenizer's chat template; where it has none, the messages stand below each other. Where a template
    knows no system, as Gemma's, what the system says stands before what the user says. A model that can think
    before it speaks is asked not to.

    Args:
        tokenizer: of the model.
        messages: each with a `role` and its `content`.

    Raises:
        EngramError: a chat template that takes no such messages.
    """
    contents = [message["content"] for message in messages]
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer("\n\n".join([*contents, ""]))["input_ids"])
    joined = [{"role": "user", "content": "\n\n".join(contents)}]
    text = _templated(tokenizer, messages) or _templated(tokenizer, joined)
    if text is None:
        raise EngramError("tokenizer: expected a chat template that takes a user's message, got another")
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def rendered(tokenizer, messages: Sequence[Mapping[str, str]], ask: bool = True) -> str:
    """A conversation by the tokenizer's template; `ask`: up to where the model is to speak.

    A model that can think aloud is asked not to: its template then begins an answer as those to learn from.
    """
    return tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=ask, enable_thinking=False
    )


def _templated(tokenizer, messages: Sequence[Mapping[str, str]]) -> str | None:
    """The text of a conversation; None where the template refuses a message, or leaves one out."""
    from jinja2 import TemplateError

    try:
        text = rendered(tokenizer, messages)
    except TemplateError:
        return None
    return text if all(message["content"].strip() in text for message in messages) else None
