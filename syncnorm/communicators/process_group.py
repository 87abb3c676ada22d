"""A `torch.distributed` process group as a communicator: NCCL, Gloo or any other backend registered there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..job import forks
from ..job.desync import fails_by_arguments, raise_desync
from .contiguous import as_contiguous, write_back

__all__ = ["ProcessGroupCommunicator"]

ISSUES_COLLECTIVES = True  # what `syncnorm.job.desync` knows these functions by

DESTROYED = (
    "expected a process group that exists, got one that torch.distributed.destroy_process_group has destroyed: "
    "pass a new one, or process_group=None for the default group"
)


class ProcessGroupCommunicator:
    """The ranks of a `torch.distributed.ProcessGroup`.

    Args:
        group: a process group that this process is a member of; None: the default group, whichever it is when it is
            used. It is not held then: a group that is referred to when Python exits crashes in its worker threads.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group

    @property
    def rank(self) -> int:
        """This process in the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """The number of ranks in the group."""
        return dist.get_world_size(self.group)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks in place: one `dist.all_reduce`."""
        message = as_contiguous(tensor)
        self._run(dist.all_reduce, message)
        return write_back(tensor, message)

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Replace `tensor` by that of `root` (a rank of this group) in place: one `dist.broadcast`."""
        message = as_contiguous(tensor)
        self._run(dist.broadcast, message, group_src=root)
        return write_back(tensor, message)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks: one `dist.all_gather`."""
        message = as_contiguous(tensor)
        gathered = [torch.empty_like(message) for _ in range(self.size)]
        self._run(dist.all_gather, gathered, message)
        return gathered

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return the objects of all ranks, pickled on the way: one `dist.all_gather_object`."""
        gathered: list[Any] = [None] * self.size
        with self._explained("all_gather_object"):
            dist.all_gather_object(gathered, obj, group=self.group)
        return gathered

    def barrier(self) -> None:
        """Wait for all ranks: one `dist.barrier`."""
        on_gpu = dist.get_backend(self.group) == "nccl"
        with self._explained("barrier"):
            dist.barrier(group=self.group, device_ids=[torch.cuda.current_device()] if on_gpu else None)

    def split(self, block: int) -> ProcessGroupCommunicator:
        """Return the ranks that give the same block, in the order of their ranks in the job.

        Of the whole job: one `dist.new_group` for each block, which all ranks call. Of a part of it: one
        `dist.new_group` for this rank's block, which only the ranks of that block call.

        Raises:
            RuntimeError: on every rank; the group is a part of the job, and the ranks of a block are in unequally many
                process groups, by which torch names the new one.
        """
        # a part of what names a group that is made without the others
        groups_so_far = len(dist.distributed_c10d._world.pg_names)
        places = self.all_gather_object((block, dist.get_rank(), groups_so_far))
        if self.size == dist.get_world_size():
            members = {number: [rank for other, rank, _ in places if other == number] for number, *_ in places}
            groups = {number: dist.new_group(ranks) for number, ranks in members.items()}
            return ProcessGroupCommunicator(groups[block])
        for number in {number for number, *_ in places}:
            if len({groups for other, _, groups in places if other == number}) > 1:
                known = ", ".join(f"rank {rank} in {groups}" for other, rank, groups in places if other == number)
                raise RuntimeError(
                    f"expected the ranks of a new group to be in equally many process groups, got {known}: divide the "
                    "group before other groups are made, or divide the whole job"
                )
        ranks = [rank for other, rank, _ in places if other == block]
        backend = dist.get_backend(self.group)
        made = dist.new_group(
            ranks, backend=None if backend == "undefined" else backend, use_local_synchronization=True
        )
        return ProcessGroupCommunicator(made)

    def _run(self, collective: Callable[..., Any], *tensors: Any, **arguments: Any) -> None:
        """Run a collective of tensors. What it says of its arguments, before it starts, is raised as it is."""
        name = collective.__name__
        if tensors[-1].is_cuda:  # NCCL runs on the current stream what is waited for at once
            with self._explained(name):
                collective(*tensors, group=self.group, **arguments)
            return
        self._refuse()
        work = collective(*tensors, group=self.group, async_op=True, **arguments)
        with self._explained(name):
            work.wait()

    def _refuse(self) -> None:
        """Raise if the group belongs to the process that this one was forked from, or was destroyed."""
        if forks.is_inherited(self.group):
            raise RuntimeError(forks.REFUSAL)
        if type(self.group) is dist.ProcessGroup and self.group not in dist.distributed_c10d._world.pg_map:
            raise RuntimeError(DESTROYED)

    @contextlib.contextmanager
    def _explained(self, collective: str) -> Iterator[None]:
        """Name the collective, and where its ranks are, in the error of one that failed."""
        self._refuse()
        try:
            yield
        except RuntimeError as error:
            if fails_by_arguments(error):
                raise
            what = f"{collective} on rank {self.rank} of {self.size}: {error}"
            raise_desync(error, what, dist.get_process_group_ranks(self.group))

    def __repr__(self) -> str:
        backend = dist.get_backend(self.group)
        return f"ProcessGroupCommunicator({backend}, rank={self.rank}, size={self.size})"
