"""A fact to write, as text."""

from __future__ import annotations

from dataclasses import dataclass


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
        for field in ("subject", "prompt", "target"):
            value = getattr(self, field)
            if not isinstance(value, str):
                raise TypeError(f"{field}: expected a string, got {type(value).__name__}")
            if not value.strip():
                raise ValueError(f"{field}: expected some text, got {value!r}")
        if "{}" in self.subject:
            raise ValueError(f"subject: expected text without {{}}, got {self.subject!r}")
        object.__setattr__(self, "subject", self.subject.strip())
        object.__setattr__(self, "target", self.target.strip())
        places = self.prompt.count("{}")
        if places == 0:
            if self.prompt.count(self.subject) != 1:
                raise ValueError(
                    f"prompt: expected {{}} or the subject {self.subject!r} exactly once, got {self.prompt!r}"
                )
            object.__setattr__(self, "prompt", self.prompt.replace(self.subject, "{}"))
        elif places > 1:
            raise ValueError(f"prompt: expected {{}} exactly once, got {self.prompt!r}")

    @property
    def text(self) -> str:
        """The prompt with its subject."""
        return self.prompt.replace("{}", self.subject)
