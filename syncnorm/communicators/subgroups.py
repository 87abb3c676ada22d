"""Smaller groups out of a larger one: the ranks of a node, or blocks of consecutive ranks."""

from __future__ import annotations

import socket

from . import Communicator, ProcessGroupLike, communicator

__all__ = ["new_subgroups"]


def new_subgroups(by: str | int, group: ProcessGroupLike = None) -> Communicator:
    """Divide a group of ranks and return this rank's part, for statistics shared within a node or a block.

    Args:
        by: "node": the ranks of the group on this rank's host; k: this rank's block of k consecutive ranks of the group
            (the last block may be smaller).
        group: the ranks to divide, as in `syncnorm.communicator`; None: all ranks of the job.

    Returns:
        a communicator to give as `process_group`.

    Collectives: of all ranks of the group, which must all call this. They gather their blocks and make the new groups.

    Raises:
        ValueError: `by` is neither "node" nor a positive number, or this rank is not in the group.
        TypeError: `group` is not a process group, or is a communicator without the method `split`.
        RuntimeError: the ranks of a new group are not in equally many process groups of torch.distributed so far, by
            which torch names a new group where `group` is only a part of the job.
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
