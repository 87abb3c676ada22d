"""Divide a group of ranks: into the ranks of each node, or into blocks of consecutive ranks."""

from __future__ import annotations

import socket
from typing import Literal

from . import Communicator, ProcessGroupLike, communicator

__all__ = ["new_subgroups"]


def new_subgroups(by: Literal["node"] | int, group: ProcessGroupLike = None) -> Communicator:
    """Divide a group of ranks and return this rank's part, for statistics shared within a node or a block.

    Args:
        by: "node" for the ranks of the group on this rank's host, or an integer k for this rank's block of k
            consecutive ranks of the group. The last block may be smaller.
        group: the ranks to divide, as in `syncnorm.communicator`. Default: all ranks of the job.

    Returns:
        a communicator to pass as `process_group`.

    Collectives: all ranks of the group must call this. They gather their blocks and create the new groups.

    Raises:
        ValueError: `by` is neither "node" nor a positive number, or this rank is not in the group.
        TypeError: `group` is not a process group, or is a communicator without the method `split`.
        RuntimeError: `group` is not the whole job, and the ranks of a new group belong to different numbers of
            torch.distributed's process groups. torch derives the name of a new group from that number.
    """
    parent = communicator(group)
    if not callable(getattr(parent, "split", None)):
        raise TypeError(f"expected a communicator that defines split(block), got {parent!r}: add the method")
    if by == "node":
        hosts = parent.all_gather_object(socket.gethostname())
        return parent.split(hosts.index(hosts[parent.rank]))
    if isinstance(by, int) and not isinstance(by, bool) and by > 0:
        return parent.split(parent.rank // by)
    raise ValueError(f'expected "node" or a positive number of ranks, got {by!r}')
