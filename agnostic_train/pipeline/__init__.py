"""Runs a recipe: its stages, what each one receives, and which of them need not run again."""

STAGES = {
    "detect": "find each language's related, shared and exclusive neurons",
    "score": "switch neurons off and compute the language-agnostic score",
    "train": "train the chosen neurons",
    "export": "write the enhanced checkpoint, and check that nothing else moved",
    "evaluate": "measure every language before and after, on test text",
    "report": "write report.html and the figures",
}
"""The stages of `run`, in order."""

STAGE_HELP = {
    "run": f"every stage in order: {', '.join(STAGES)}",
    **STAGES,
    "compare": "train every strategy and baseline on the same data and budget, and test the differences",
}


class OutOfMemoryError(RuntimeError):
    """A stage needs more memory than the device has; the message is one line that names the keys to lower."""
