"""The exceptions of this package."""

__all__ = ["DesyncError", "NonFiniteError", "RunningStatsError", "SyncNormError", "printable"]


class SyncNormError(RuntimeError):
    """Base class: the ranks of a job, or their state, are inconsistent."""


class DesyncError(SyncNormError):
    """A collective failed or timed out, or the ranks are in different layers. The message says where each rank is."""


class NonFiniteError(SyncNormError):
    """The values of a layer on some rank are NaN or infinite. The message says in which layer, and on which ranks."""


class RunningStatsError(SyncNormError, AssertionError):
    """The running statistics of a model differ between the ranks. The message says where, and on which ranks."""


def printable(text: str) -> str:
    """Return text with its control characters escaped, so that text of another process is safe to print."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
