"""Whether the ranks of an MPI communicator are in step: not after a call that failed.

A collective whose wait timed out may complete later, or never. Its rank cannot tell, so the next collective of that
rank may meet another one of its peers.
"""

from __future__ import annotations

import time

from ..errors import DesyncError
from .library import MPI

__all__ = ["Health", "health", "share"]

_KEY = MPI.Comm.Create_keyval()


class Health:
    """The first failure of an MPI communicator, if there was one."""

    def __init__(self) -> None:
        self.failure: str | None = None

    def fail(self, what: str) -> None:
        """Note the first call that failed, and when."""
        if self.failure is None:
            first = what.splitlines()[0]
            self.failure = (
                f"expected a communicator whose calls have all succeeded, got one that failed at "
                f"{time.strftime('%H:%M:%S')}: {first}. Its ranks may be at different calls since then: end this job, "
                "and start a new one from the last checkpoint"
            )

    def check(self) -> None:
        """Raise DesyncError if a call has failed."""
        if self.failure is not None:
            raise DesyncError(self.failure)


def health(comm: MPI.Comm) -> Health:
    """Return the health of a communicator: one object, whoever asks. No collective."""
    noted = comm.Get_attr(_KEY)
    if isinstance(noted, Health):
        return noted
    share(made := Health(), comm)
    return made


def share(noted: Health, comm: MPI.Comm) -> None:
    """Let a communicator fail where another one does."""
    comm.Set_attr(_KEY, noted)
