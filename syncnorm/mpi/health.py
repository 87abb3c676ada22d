"""The health of an MPI communicator, which all objects for it share."""

from __future__ import annotations

from ..communicators.health import Health
from .library import MPI

__all__ = ["Health", "health", "share"]

_KEY = MPI.Comm.Create_keyval()


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
