"""The package's own error, and whose argument an error names."""

import re
from collections.abc import Iterator
from contextlib import contextmanager


class EngramError(RuntimeError):
    """A request that is well-formed but cannot be carried out soundly; nothing was changed.

    Wrong shapes and values raise `ValueError`, wrong types and dtypes `TypeError`; this error is for the
    rest: a singular covariance, dependent keys, an edit whose base has changed, a backend that is missing.
    """


@contextmanager
def naming(argument: str, *others: str) -> Iterator[None]:
    """Let an error about one of some other arguments, inside the block, name this one in its place."""
    try:
        yield
    except (EngramError, ValueError) as error:
        kind = EngramError if isinstance(error, EngramError) else ValueError
        raise kind(re.sub(rf"^({'|'.join(others)}):", f"{argument}:", str(error))) from error
