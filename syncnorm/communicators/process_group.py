"""A `torch.distributed` process group as a communicator: NCCL, Gloo or any other registered backend."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import DesyncError
from ..job import forks
from ..job.desync import fails_by_arguments, raise_desync
from .compiled import register
from .contiguous import as_contiguous, write_back
from .label import Label
from .listeners import listeners, report_call
from .sharing import route_of, shared_memory_of, timeout_of

if TYPE_CHECKING:
    from .shared_memory import SharedMemory

__all__ = ["ProcessGroupCommunicator"]

ISSUES_COLLECTIVES = True  # lets `syncnorm.job.desync` recognize these functions

DESTROYED = (
    "expected a process group that exists, got one that torch.distributed.destroy_process_group has destroyed: "
    "pass a new one, or process_group=None for the default group"
)


class ProcessGroupCommunicator:
    """The ranks of a `torch.distributed.ProcessGroup`.

    Args:
        group: a process group that this process is a member of. None stands for the current default group, which is
            looked up at each use. It is not stored, because a group that is still referenced when Python exits crashes
            in its worker threads.
    """

    takes_labels = True

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        # The group, and the memory that its ranks share. Both end when the group is destroyed.
        self._known: tuple[weakref.ref[dist.ProcessGroup], weakref.ref[SharedMemory] | None] | None = None
        register(self)

    @property
    def rank(self) -> int:
        """The rank of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """The number of ranks in the group."""
        return dist.get_world_size(self.group)

    def all_reduce(self, tensor: Tensor, label: Label | None = None) -> Tensor:
        """Sum `tensor` over the ranks in place.

        A CPU tensor of at most 64 KB is summed in memory that the ranks of a host share, if there are any. Other
        tensors: one `dist.all_reduce`.
        """
        message = as_contiguous(tensor)
        if not (tensor.is_cpu and self._all_reduce_in_memory(message, label)):
            self._run(dist.all_reduce, message)
        return write_back(tensor, message)

    def _all_reduce_in_memory(self, tensor: Tensor, label: Label | None) -> bool:
        """Sum the tensor in shared memory. Return False if the backend of the group has to sum it."""
        self._check()
        try:
            memory = self._shared_memory()
            summed = memory is not None and memory.all_reduce(tensor, label)
        except DesyncError:
            raise
        except RuntimeError as error:
            self._raise("all_reduce", error)
        if summed and listeners:
            report_call("all_reduce", [tensor], self.size)
        return summed

    def _shared_memory(self) -> SharedMemory | None:
        group = self._current_group()
        if self._known is None or self._known[0]() is not group:
            shared = shared_memory_of(group)
            self._known = weakref.ref(group), None if shared is None else weakref.ref(shared)
        memory = self._known[1]
        return None if memory is None else memory()

    def route(self) -> str:
        """Return how CPU tensors of at most 64 KB are summed, such as "in shared memory". The first call is collective.

        Raises:
            RuntimeError: the other ranks do not join the first call.
        """
        return route_of(self._current_group())

    def _current_group(self) -> dist.ProcessGroup:
        group = dist.group.WORLD if self.group is None else self.group
        assert group is not None
        return group

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Overwrite `tensor` with that of `root` (a rank of this group): one `dist.broadcast`."""
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
        """Return the objects of all ranks, which are pickled: one `dist.all_gather_object`."""
        gathered: list[Any] = [None] * self.size
        with self._located("all_gather_object"):
            dist.all_gather_object(gathered, obj, group=self.group)
        return gathered

    def barrier(self) -> None:
        """Wait for all ranks: one `dist.barrier`."""
        on_gpu = dist.get_backend(self.group) == "nccl"
        with self._located("barrier"):
            dist.barrier(group=self.group, device_ids=[torch.cuda.current_device()] if on_gpu else None)

    def split(self, block: int) -> ProcessGroupCommunicator:
        """Return the ranks that pass the same `block`, in the order of their ranks in the job.

        If this group is the whole job, all ranks call one `dist.new_group` for each block. Otherwise each rank calls
        one `dist.new_group`, for its own block. The timeout is that of this group.

        Raises:
            RuntimeError: on every rank, if this group is not the whole job and the ranks of a block belong to
                different numbers of process groups. torch derives the name of a new group from that number.
        """
        groups_so_far = len(dist.distributed_c10d._world.pg_names)  # part of the name of a group made by its members
        places = self.all_gather_object((block, dist.get_rank(), groups_so_far))
        if self.size == dist.get_world_size():
            members = {number: [rank for other, rank, _ in places if other == number] for number, *_ in places}
            groups = {number: dist.new_group(ranks, timeout=self._timeout()) for number, ranks in members.items()}
            return ProcessGroupCommunicator(groups[block])
        for number in {number for number, *_ in places}:
            if len({groups for other, _, groups in places if other == number}) > 1:
                known = ", ".join(f"rank {rank} in {groups}" for other, rank, groups in places if other == number)
                raise RuntimeError(
                    f"expected the ranks of a new group to be in equally many process groups, got {known}: call "
                    "new_subgroups before other groups are created, or divide the whole job"
                )
        ranks = [rank for other, rank, _ in places if other == block]
        backend = dist.get_backend(self.group)
        made = dist.new_group(
            ranks,
            backend=None if backend == "undefined" else backend,
            timeout=self._timeout(),
            use_local_synchronization=True,
        )
        return ProcessGroupCommunicator(made)

    def _timeout(self) -> timedelta:
        """Return the timeout of the group's collectives, which its parts take over."""
        return timedelta(seconds=timeout_of(self._current_group()))

    def _run(self, collective: Callable[..., Any], *tensors: Any, **arguments: Any) -> None:
        """Run a collective of tensors. Errors about its arguments, raised before it starts, are unchanged."""
        name = collective.__name__
        if tensors[-1].is_cuda:  # without async_op, NCCL runs on the current stream
            with self._located(name):
                collective(*tensors, group=self.group, **arguments)
            return
        self._check()
        work = collective(*tensors, group=self.group, async_op=True, **arguments)
        with self._located(name):
            work.wait()

    def _check(self) -> None:
        """Raise if the group was inherited by a fork or was destroyed."""
        if forks.is_inherited(self.group):
            raise RuntimeError(forks.REFUSAL)
        if type(self.group) is dist.ProcessGroup and self.group not in dist.distributed_c10d._world.pg_map:
            raise RuntimeError(DESTROYED)

    @contextlib.contextmanager
    def _located(self, collective: str) -> Iterator[None]:
        """Raise errors of the collective as DesyncError, with the location of each rank."""
        self._check()
        try:
            yield
        except RuntimeError as error:
            if fails_by_arguments(error):
                raise
            self._raise(collective, error)

    def _raise(self, collective: str, error: RuntimeError) -> NoReturn:
        what = f"{collective} on rank {self.rank} of {self.size}: {error}"
        raise_desync(error, what, dist.get_process_group_ranks(self.group))

    def __repr__(self) -> str:
        backend = dist.get_backend(self.group)
        return f"ProcessGroupCommunicator({backend}, rank={self.rank}, size={self.size})"
