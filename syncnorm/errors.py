"""What this package raises beside Python's own errors."""

__all__ = ["DesyncError", "SyncNormError", "printable"]


class SyncNormError(RuntimeError):
    """The ranks of a job, or what they hold, do not go together."""


class DesyncError(SyncNormError):
    """A collective did not come to its end; the text says where each rank is, and who is missing."""


def printable(text: str) -> str:
    """Return text of another process as it may be shown on a terminal, with control characters escaped."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
