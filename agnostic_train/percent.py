"""Changes for people to read."""


def percent(change: float) -> str:
    """A relative change in percent, with its sign, and a digit more where one alone would show none."""
    return f"{change:+z.1%}" if change == 0 or abs(change) >= 1e-3 else f"{change:+z.2%}"
