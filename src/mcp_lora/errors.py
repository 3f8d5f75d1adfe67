"""The one exception that a user is meant to see."""


class McpLoraError(Exception):
    """What went wrong, in one line that ends with the next command to run.

    `code` is the process's exit code: 2 for a mistake that the user can fix, otherwise the
    engine's own.
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM: no `except Exception` may take it for a failure of its own."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
