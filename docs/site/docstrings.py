"""How the reference reads docstrings."""

import re

import griffe

# `pre, ft: what both are`, over as many lines as are further in.
_TOGETHER = re.compile(r"^( +)(\*{0,2}\w+(?:, \*{0,2}\w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Reads what stands under `Example:` as code with prompts, and two arguments in one line as two."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            text = obj.docstring.value.replace("Example:\n", "Examples:\n")
            obj.docstring.value = _TOGETHER.sub(_apart, text)


def _apart(found: re.Match) -> str:
    indent, names, text = found.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))
