"""A judge of answers: any function, or a program that reads and writes lines."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..errors import EngramError
from .measures import Figures

# Objects with `prompt`, `answer` and `text`; a number from 0 to 1 for each, or True and False.
Judge = Callable[[list[dict[str, str]]], Sequence[float]]


def judged(figures: Sequence[Figures], judge: Judge) -> list[Figures]:
    """The figures with the judge's word on every answer.

    Raises:
        EngramError: the judge gives another number of words, or one that is not from 0 to 1.
    """
    flat = [answer for one in figures for answer in one.answers]
    asked = [{"prompt": each.prompt, "answer": each.right, "text": each.text} for each in flat]
    words = list(judge(asked)) if asked else []
    if len(words) != len(flat):
        raise EngramError(f"judge: expected {len(flat)} numbers, one an answer, got {len(words)}")
    for word in words:
        if not isinstance(word, int | float) or not 0 <= word <= 1:
            raise EngramError(f"judge: expected numbers from 0 to 1, or true and false, got {word!r}")
    numbers = iter(map(float, words))
    return [
        replace(one, answers=[replace(answer, judged=next(numbers)) for answer in one.answers])
        for one in figures
    ]


def command_judge(command: str) -> Judge:
    """A judge that runs a program: a JSON object a line in, a JSON number or true or false a line out.

    Example:
        >>> judge = command_judge("python judge.py --model large")
    """
    words = shlex.split(command)
    if not words:
        raise ValueError(f"judge: expected a command, got {command!r}")

    def judge(asked: list[dict[str, str]]) -> list[float]:
        lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in asked)
        try:
            run = subprocess.run(
                words, input=lines, capture_output=True, text=True, encoding="utf-8", check=True
            )
            return [json.loads(line) for line in run.stdout.splitlines() if line.strip()]
        except OSError as error:
            raise EngramError(f"judge: expected a program, got {words[0]!r} ({error.strerror})") from None
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip().splitlines() or ["nothing"])[-1]
            raise EngramError(
                f"judge: expected {words[0]!r} to end well, got status {error.returncode}: {last}"
            ) from None
        except ValueError as error:
            raise EngramError(f"judge: expected a number a line, got other text ({error})") from None

    return judge
