"""A fact to write, as text."""

from __future__ import annotations

from dataclasses import dataclass

from ..hf.tokens import check_prompt, check_text


@dataclass(frozen=True)
class Edit:
    """One fact to write: after `prompt` about `subject`, the model shall say `target`.

    Args:
        subject: what the fact is about, as it stands in the text.
        prompt: the text before the target, with one `{}` where the subject stands. The subject itself, once,
            will do: it is replaced by `{}`.
        target: what shall follow; the space before it is understood.

    Raises:
        TypeError: an argument is not a string.
        ValueError: an argument is empty, the subject holds `{}`, or the prompt does not name the subject
            exactly once.

    Example:
        >>> Edit("The Eiffel Tower", "{} is located in the city of", "Rome")
    """

    subject: str
    prompt: str
    target: str

    def __post_init__(self):
        subject, prompt = check_prompt(self.subject, self.prompt)
        fields = {"subject": subject, "prompt": prompt, "target": check_text("target", self.target)}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def text(self) -> str:
        """The prompt with its subject."""
        return self.prompt.replace("{}", self.subject)
