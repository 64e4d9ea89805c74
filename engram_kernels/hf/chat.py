"""Prompts of a conversation, as a model was taught to read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def chat_ids(tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The tokens of a conversation up to where the model is to speak.

    By the tokenizer's chat template; where it has none, the messages stand below each other.

    Args:
        tokenizer: of the model.
        messages: each with a `role` and its `content`.
    """
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    text = "\n\n".join(message["content"] for message in messages)
    return list(tokenizer(f"{text}\n\n")["input_ids"])
