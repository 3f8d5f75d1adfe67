"""The errors that are shown to users."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager


class McpLoraError(Exception):
    """What went wrong, in one line that ends with the next command to run.

    `code` is the process's exit code: 2 for an error that the user can fix, else 1 or the engine's own.
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM: a BaseException, so that no `except Exception` catches it.

    `option` is the option that restarts a training, if one has started: "--resume", "--overwrite" or "".
    """

    def __init__(self, code: int) -> None:
        super().__init__("interrupted")
        self.code = code
        self.option: str | None = None


def quoted(word: object) -> str:
    """Return a path, or another word of a command in a message, as a shell reads it."""
    return shlex.quote(str(word))


@contextmanager
def explained(problem: str, command: str) -> Iterator[None]:
    """Raise an OSError as a McpLoraError: the problem, the reason, and the next command to run."""
    try:
        yield
    except OSError as error:
        raise McpLoraError(f"{problem} ({error.strerror or error}): {command}") from None
