"""Formatting of relative changes."""


def percent(change: float) -> str:
    """Formats a relative change in percent, with its sign and one decimal, or as many as a smaller one needs.

    An interval's end must not look as if it were on the other side of zero.
    """
    if change == 0 or abs(change) >= 1e-3:
        return f"{change:+z.1%}"
    return f"{change:+.2%}" if abs(change) >= 5e-5 else f"{100 * change:+.1g}%"
