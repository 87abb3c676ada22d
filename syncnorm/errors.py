"""The exceptions of this package."""

__all__ = ["DesyncError", "RunningStatsError", "SyncNormError", "printable"]


class SyncNormError(RuntimeError):
    """Base class: the ranks of a job, or their state, are inconsistent."""


class DesyncError(SyncNormError):
    """A collective failed or timed out, or the ranks are in different layers. The message says where each rank is."""


class RunningStatsError(SyncNormError, AssertionError):
    """The running statistics of a model differ between the ranks. The message says where, and on which ranks."""


def printable(text: str) -> str:
    """Return text with its control characters escaped, so that text of another process is safe to print."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
