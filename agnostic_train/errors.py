"""What a user can do wrong, in one line."""


class UserError(ValueError):
    """A mistake in the user's input: the message is one line that names the key or file and the fix."""

    def __init__(self, message: str):
        # It quotes libraries, and keys as the user wrote them, which may have lines of their own.
        super().__init__(" ".join(message.split()))


def in_one_line(error: Exception, length: int = 300) -> str:
    """Another library's error, to be quoted in ours: its type and the beginning of its message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:length]
