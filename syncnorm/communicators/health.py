"""Whether the ranks of a communicator are still synchronized. After a failed call they may not be.

A collective that timed out may complete later or never, and its rank cannot know. The next collective of that rank
could then be matched with a different one of its peers.
"""

from __future__ import annotations

import time

from ..errors import DesyncError

__all__ = ["Health"]


class Health:
    """The first failure of a communicator, if any."""

    def __init__(self) -> None:
        self.failure: str | None = None

    def fail(self, what: str) -> None:
        """Record the first call that failed, and the time."""
        if self.failure is None:
            first = what.splitlines()[0]
            self.failure = (
                f"expected a communicator whose calls have all succeeded, got one that failed at "
                f"{time.strftime('%H:%M:%S')}: {first}. Its ranks may be at different calls since then: end this job "
                "and start a new one from the last checkpoint"
            )

    def check(self) -> None:
        """Raise DesyncError if a call has failed."""
        if self.failure is not None:
            raise DesyncError(self.failure)
