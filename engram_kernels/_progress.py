"""How long work tells its caller how far it is."""

from collections.abc import Callable

# Called as `progress(stage, done, total)`: the stage's name, and how much of it is done.
Progress = Callable[[str, int, int], None]
