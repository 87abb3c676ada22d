"""An mpi4py communicator: MPI collectives directly on the memory of the tensors.

Importing this module imports mpi4py, which initializes MPI.
"""

from __future__ import annotations

import pickle
import weakref
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..communicators.contiguous import write_back
from ..job.desync import raise_desync
from .buffers import memory_at, message, stage
from .datatypes import ARITHMETIC, arithmetic
from .forks import forbid
from .health import health
from .library import MPI, raise_of_mpi, ranks_in_the_job
from .progress import wait_until
from .unfinished import hold

__all__ = ["MpiCommunicator", "of_comm"]

ISSUES_COLLECTIVES = True  # what `syncnorm.job.desync` knows these functions by

IN_PLACE = MPI.IN_PLACE


class MpiCommunicator:
    """The ranks of an `mpi4py.MPI.Comm`.

    Args:
        comm: an intracommunicator that this process is a member of (not `MPI.COMM_NULL`).
        timeout: raise DesyncError, naming the operation, when its peers have not come after this time; None: wait.
            With a timeout tensors travel by MPI's non-blocking collectives.

    After a call that timed out, or that MPI reported an error of, every later call on this communicator raises
    DesyncError: its ranks may be at different calls.
    """

    unusable = ""  # why collectives raise; of the class in a forked child

    def __init__(self, comm: MPI.Comm, timeout: timedelta | None = None):
        self.comm = comm
        self.timeout = timeout
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.health = health(comm)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks in place: one `MPI_Allreduce`. float16 and bfloat16 are summed in float32."""
        try:
            datatype = ARITHMETIC[tensor.dtype]
        except KeyError:
            return self._all_reduce_staged(tensor)
        if self.timeout is None and tensor.is_cpu and tensor.is_contiguous() and self.health.failure is None:
            # What a layer sends. MPI takes 2 µs for it, so each further look-up would show.
            if self.unusable:
                raise RuntimeError(self.unusable)
            try:
                self.comm.Allreduce(IN_PLACE, (memory_at(tensor.data_ptr(), tensor.nbytes), datatype))
            except MPI.Exception as error:
                self._raise("Allreduce", error)
            return tensor
        return self._all_reduce_staged(tensor)

    def _all_reduce_staged(self, tensor: Tensor) -> Tensor:
        dtype, datatype = arithmetic(tensor.dtype)
        staged = stage(tensor, dtype)
        self._run("Allreduce", IN_PLACE, message(staged, datatype), memory=staged)
        return write_back(tensor, staged)

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Replace `tensor` by that of `root` in place: one `MPI_Bcast`."""
        staged = stage(tensor)
        self._run("Bcast", message(staged), root, memory=staged)
        return write_back(tensor, staged)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks: one `MPI_Allgather`."""
        staged = stage(tensor)
        gathered = staged.new_empty((self.size, *staged.shape))
        self._run("Allgather", message(staged), message(gathered), memory=(staged, gathered))
        return list(gathered.to(tensor.device).unbind(0))

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return the objects of all ranks, pickled on the way: one `MPI_Allgather`, and one of the sizes."""
        pickled = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
        sizes = [int(size) for size in self.all_gather(torch.tensor(len(pickled), device="cpu"))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device="cpu")
        padded[: len(pickled)] = pickled
        gathered = zip(self.all_gather(padded), sizes, strict=True)
        return [pickle.loads(received[:size].numpy().tobytes()) for received, size in gathered]

    def barrier(self) -> None:
        """Wait for all ranks: one `MPI_Barrier`."""
        self._run("Barrier")

    def local_rank(self) -> int:
        """Return this rank's place among those on its host: one `MPI_Comm_split_type`, which all ranks call."""
        self._check()
        host = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        rank: int = host.Get_rank()
        host.Free()
        return rank

    def split(self, block: int) -> MpiCommunicator:
        """Return the ranks that give the same block: one `MPI_Comm_split`, which all ranks of this group call."""
        self._check()
        return MpiCommunicator(self.comm.Split(block, self.rank), self.timeout)

    def _run(self, function: str, *arguments: Any, memory: Any = None) -> None:
        """Call the MPI function: blocking, or under the timeout in its non-blocking form. `memory` must outlive it."""
        self._check()
        try:
            if self.timeout is None:
                getattr(self.comm, function)(*arguments)
                return
            request = getattr(self.comm, "I" + function.lower())(*arguments)
            try:
                wait_until(request.Test, self.timeout, self._name(function))
            except BaseException:
                hold(request.Test, (request, memory))
                raise
        except (MPI.Exception, TimeoutError) as error:
            self._raise(function, error)

    def _check(self) -> None:
        """Raise if no call can be made here: in a forked child, in a group that was destroyed, after a failure."""
        if self.unusable:
            raise RuntimeError(self.unusable)
        self.health.check()

    def _raise(self, function: str, error: Exception) -> NoReturn:
        """Let no call follow on one that failed, and raise its error: with the place of every rank, if it is theirs."""
        if isinstance(error, MPI.Exception):
            self.health.fail(f"{self._name(function)}: {error}")
            raise_of_mpi(error, self._name(function), self.comm)
        self.health.fail(str(error))
        raise_desync(error, str(error), ranks_in_the_job(self.comm))

    def _name(self, function: str) -> str:
        return f"MPI_{function} on rank {self.rank} of {self.size}"

    def __repr__(self) -> str:
        return f"MpiCommunicator(rank={self.rank}, size={self.size})"


_made: weakref.WeakValueDictionary[int, MpiCommunicator] = weakref.WeakValueDictionary()  # by MPI handle


def of_comm(comm: MPI.Comm) -> MpiCommunicator:
    """Return the communicator of an MPI.Comm, the same one for each."""
    if comm == MPI.COMM_NULL:
        raise ValueError(
            f"expected an MPI communicator that this rank is a member of, got MPI.COMM_NULL on rank "
            f"{MPI.COMM_WORLD.rank} of MPI.COMM_WORLD"
        )
    made = _made.get(comm.handle)
    if made is None or made.comm != comm:  # a handle is used again after Free
        _made[comm.handle] = made = MpiCommunicator(comm)
    return made


forbid(MpiCommunicator)
