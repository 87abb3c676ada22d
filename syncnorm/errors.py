"""What this package raises beside Python's own errors."""

__all__ = ["DesyncError", "SyncNormError"]


class SyncNormError(RuntimeError):
    """The ranks of a job, or what they hold, do not go together."""


class DesyncError(SyncNormError):
    """A collective did not come to its end; the text says where each rank is, and who is missing."""
