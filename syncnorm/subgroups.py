"""Smaller groups out of the job's: the ranks of a node, or blocks of consecutive ranks."""

from __future__ import annotations

import socket
from typing import Protocol

from .communicators import Communicator, communicator

__all__ = ["new_subgroups"]


class _Divisible(Communicator, Protocol):
    """What the job's own communicators can do beyond the protocol."""

    def split(self, block: int) -> Communicator:
        """Return the ranks that call this with the same `block`, in the order of their ranks here; collective."""
        ...


def new_subgroups(by: str | int) -> Communicator:
    """Divide the job's ranks into groups and return this rank's, for statistics shared within a node or a block.

    Args:
        by: "node": the ranks on this rank's host; k: this rank's block of k consecutive ranks (the last one has what is
            left).

    Returns:
        a communicator to give as `process_group`.

    Collectives: of all ranks of `syncnorm.communicator()`, which all call this: they gather their blocks and make the
    groups.

    Raises:
        ValueError: `by` is neither "node" nor a positive number.
    """
    job: _Divisible = communicator()  # type: ignore[assignment]
    if by == "node":
        hosts = job.all_gather_object(socket.gethostname())
        return job.split(hosts.index(hosts[job.rank]))
    if isinstance(by, int) and by > 0:
        return job.split(job.rank // by)
    raise ValueError(f'expected "node" or a positive number of ranks, got {by!r}')
