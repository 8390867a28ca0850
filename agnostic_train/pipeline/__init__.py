"""Runs a recipe: its stages, what each one receives, and which of them need not run again."""

STAGES = {
    "detect": "find each language's related, shared and exclusive neurons",
    "score": "switch neurons off and compute the language-agnostic score",
    "pilot": "train every candidate for a few steps, and rank them",
    "train": "train the chosen neurons",
    "export": "write the enhanced checkpoint, and check that nothing else moved",
    "evaluate": "measure every language before and after, on test text",
    "report": "write report.html and the figures",
    "compare": "train every strategy and baseline on the same data and budget, and test the differences",
}
"""Every stage, in order. `pilot` belongs to the command `train`, for recipes whose strategy it is."""

COMMANDS = {
    "run": f"every stage in order: {', '.join(it for it in STAGES if it not in ('pilot', 'compare'))}",
    **{name: text for name, text in STAGES.items() if name != "pilot"},
}


class OutOfMemoryError(RuntimeError):
    """A stage needs more memory than the device has; the message is one line that names the keys to lower."""
