"""How a long computation reports its progress."""

from collections.abc import Callable

# Called as `progress(stage, done, total)`: the stage's name, and how much of it is done.
Progress = Callable[[str, int, int], None]
