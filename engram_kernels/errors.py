"""The package's own error."""


class EngramError(RuntimeError):
    """A request that is well-formed but cannot be carried out soundly; nothing was changed.

    Wrong shapes and values raise `ValueError`, wrong types and dtypes `TypeError`; this error is for the
    rest: a singular covariance, dependent keys, an edit whose base has changed, a backend that is missing.
    """
