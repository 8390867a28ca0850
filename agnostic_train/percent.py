"""Formatting of relative changes."""


def percent(change: float) -> str:
    """Formats a relative change in percent, with its sign and one decimal, or two where it is below 0.1%."""
    return f"{change:+z.1%}" if change == 0 or abs(change) >= 1e-3 else f"{change:+z.2%}"
