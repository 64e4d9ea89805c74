"""What the command line's tests share."""


def refused(result: tuple[int, str, str], message: str) -> None:
    """What the fixture `engram` returned is an error of one sentence, which begins with the message."""
    status, _, err = result
    assert status == 1 and err.startswith(f"Error: {message}") and err.count("\n") == 1, err
