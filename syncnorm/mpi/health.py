"""Whether the ranks of an MPI communicator are still synchronized. After a failed call they may not be.

A collective that timed out may complete later or never, and its rank cannot know. The next collective of that rank
could then be matched with a different one of its peers.
"""

from __future__ import annotations

import time

from ..errors import DesyncError
from .library import MPI

__all__ = ["Health", "health", "share"]

_KEY = MPI.Comm.Create_keyval()


class Health:
    """The first failure of an MPI communicator, if any."""

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


def health(comm: MPI.Comm) -> Health:
    """Return the health of a communicator: always the same object. Issues no collective."""
    existing = comm.Get_attr(_KEY)
    if isinstance(existing, Health):
        return existing
    share(made := Health(), comm)
    return made


def share(existing: Health, comm: MPI.Comm) -> None:
    """Give `comm` the health of another communicator, so that a failure of one is a failure of both."""
    comm.Set_attr(_KEY, existing)
