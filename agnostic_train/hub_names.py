"""What can be the name of a repository on the hub, and what the hub's refusal of one means."""

from pathlib import Path

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError


def is_path(name: str | Path) -> bool:
    """Whether a name can only be a path: a hub name has at most one slash, and begins with a letter or digit."""
    return str(name).startswith((".", "/", "~")) or str(name).count("/") > 1


def refusal(error: BaseException | None, kind: str) -> str | None:
    """Returns why the hub refused a repository and what to do; None if the error isn't such a refusal.

    kind: `model` or `dataset`.
    """
    if isinstance(error, GatedRepoError):  # also a RepositoryNotFoundError
        return "it is gated; accept its terms on its page of the hub, then run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"no such folder, and no such {kind} on the hub (a private one needs `hf auth login`)"
    return None
