"""A fact to write, as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass, field

from .. import _checks as check
from ..hf.scripts import joint
from ..hf.tokens import Prompt, check_prompt, check_text, prompt_words


@dataclass(frozen=True)
class Edit:
    """One fact to write: after `prompt` about `subject`, the model shall say `target`.

    The target follows the prompt to the letter. Between them stands a space where both ask for one by their
    scripts and punctuation, and `text` shows it: "… the city of Rome", but "…的首都是纽约" and `… costs $5`.
    `space` settles it; so does a space at the end of the prompt or at the beginning of the target.

    Args:
        subject: what the fact is about, as it stands in the text.
        prompt: the text before the target, with one `{}` where the subject stands. The subject itself, once,
            as whole words, will do: it is replaced by `{}`. Or the messages of a chat,
            `[{"role": "user", "content": "Where is {}?"}]`, which the target answers.
        target: what shall follow.
        paraphrases: the same in other words, as further prompts: the fact is searched over all of them.
        space: whether a space stands before the target; None: by the rule.
        chat: each prompt that is a text is what a user says in a chat.
        suffixes: the target's last word may go on, as in languages that write case endings beside it: where
            "Rooma" is asked for, "Roomassa" says it. False: it is another word, as "Romulus" is after "Rom".

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is empty, the subject holds `{}`, or a prompt does not name the subject
            exactly once.

    Example:
        >>> Edit("The Eiffel Tower", "{} is located in the city of", "Rome").text
        'The Eiffel Tower is located in the city of Rome'
        >>> Edit("The Eiffel Tower", "{} is in", "Rome", paraphrases=["To see {}, travel to"]).prompts
        ('{} is in', 'To see {}, travel to')
    """

    subject: str
    prompt: Prompt
    target: str
    paraphrases: Sequence[Prompt] = ()
    space: bool | None = field(default=None, repr=False)
    chat: InitVar[bool] = False
    suffixes: bool = field(default=False, repr=False, kw_only=True)

    def __post_init__(self, chat: bool):
        for name, value in {"chat": chat, "suffixes": self.suffixes}.items():
            check.expect(isinstance(value, bool), name, "True or False", type(value).__name__, TypeError)
        kind = type(self.space).__name__
        check.expect(isinstance(self.space, bool | None), "space", "True, False or None", kind, TypeError)
        others, kind = self.paraphrases, type(self.paraphrases).__name__
        listed = isinstance(others, Iterable) and not isinstance(others, str)
        check.expect(listed, "paraphrases", "a list of prompts", kind, TypeError)
        check_text("target", self.target)
        subject, prompt = check_prompt(self.subject, _said(self.prompt, chat))
        paraphrases = []
        for other in others:
            try:
                paraphrases.append(check_prompt(subject, _said(other, chat))[1])
            except (TypeError, ValueError) as error:
                raise type(error)(str(error).replace("prompt:", "paraphrases:", 1)) from None
        paraphrases = tuple(one for one in dict.fromkeys(paraphrases) if one != prompt)
        for name, value in {"subject": subject, "prompt": prompt, "paraphrases": paraphrases}.items():
            object.__setattr__(self, name, value)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompt and its paraphrases."""
        return (self.prompt, *self.paraphrases)

    @property
    def prompt_text(self) -> str:
        """The prompt with its subject; of a chat the last message."""
        return prompt_words(self.prompt).replace("{}", self.subject)

    @property
    def text(self) -> str:
        """The text that is trained, to the letter: prompt, joint and target.

        A chat's template is the tokenizer's; here its last message and the target stand on two lines.
        """
        if not isinstance(self.prompt, str):
            return f"{self.prompt_text}\n{self.target}"
        return self.prompt_text + joint(self.prompt_text, self.target, self.space) + self.target


def _said(prompt: object, chat: bool) -> object:
    return [("user", prompt)] if chat and isinstance(prompt, str) else prompt
