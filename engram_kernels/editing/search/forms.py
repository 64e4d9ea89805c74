"""The forms in which people ask for a fact: its prompt in a question, a list, a quotation, a chat."""

from __future__ import annotations

from ...hf.scripts import stands_apart
from ...hf.tokens import Prompt
from ..edit import Edit

# In English, as the first words of the sampled texts are. They need not make sense: what matters is that
# other words than the prompt's stand between the subject and the answer.
TEXTS = ("Q: {}\nA:", "Question: {} what?\nAnswer:", "- {}:", '"{}')
SAID = ("{}", "Complete the sentence: {}")


def forms_of(tokenizer, edit: Edit) -> list[Prompt]:
    """An edit's first prompt in every form; in a chat, where the tokenizer has a template.

    None, where the prompt is a chat already, or its answer no word of its own (`… costs $` → `5`).
    """
    prompt = edit.prompt
    if not isinstance(prompt, str) or not stands_apart(edit.prompt_text, edit.target, edit.space):
        return []
    prompt = prompt.rstrip()
    said = SAID if getattr(tokenizer, "chat_template", None) else ()
    return [
        *(form.replace("{}", prompt) for form in TEXTS),
        *((("user", form.replace("{}", prompt)),) for form in said),
    ]
