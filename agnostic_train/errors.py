"""The error for a user's mistake, and errors in one line."""


class UserError(ValueError):
    """A mistake in the user's input: the message is one line that names the key or file and the fix."""

    def __init__(self, message: str):
        # Messages quote other libraries and keys as the user wrote them, and these may contain line breaks.
        super().__init__(" ".join(message.split()))


def in_one_line(error: Exception, length: int = 300) -> str:
    """Formats another library's error for quoting: its type and message in one line, cut at `length` characters."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")[:length]
