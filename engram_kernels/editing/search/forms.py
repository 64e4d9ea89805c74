"""A fact's prompt as it is not given: in the forms in which people ask, and a word shorter."""

from __future__ import annotations

from ...hf.scripts import stands_apart
from ...hf.tokens import Prompt
from ..edit import Edit

# In English, as the first words of the sampled texts are. They need not make sense: what matters is that
# other words than the prompt's stand between the subject and the answer.
TEXTS = ("Q: {}\nA:", "Question: {} what?\nAnswer:", "- {}:", '"{}')
SAID = ("{}", "Complete the sentence: {}")


def shortened(edit: Edit, prompt: Prompt) -> list[Prompt]:
    """An edit's prompt without one of its words, each in turn: other wordings have other words there.

    What is written together with the subject or the target stays (`… costs $` → `5`). None, where too
    little would be left to say what is asked, of a chat, and of a script without spaces between words.
    """
    if not isinstance(prompt, str):
        return []
    before, _, after = prompt.partition("{}")
    head, tail = before.split(" "), after.split(" ")
    last = len(tail) - (not stands_apart(prompt.replace("{}", edit.subject), edit.target, edit.space))
    found: list[Prompt] = []
    if len(tail) > 2:
        found += [f"{before}{{}}{' '.join(tail[:at] + tail[at + 1 :])}" for at in range(1, last)]
    if len(head) > 2:
        found += [f"{' '.join(head[:at] + head[at + 1 :])}{{}}{after}" for at in range(len(head) - 1)]
    return found


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
