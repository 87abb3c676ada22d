"""An mpi4py communicator: MPI collectives directly on the memory of tensors.

Importing this module imports mpi4py, which initializes MPI.
"""

from __future__ import annotations

import pickle
import weakref
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..communicators.compiled import register
from ..communicators.contiguous import write_back
from ..communicators.listeners import listeners, report_call
from ..job.desync import raise_desync
from .buffers import memory_at, message, stage
from .datatypes import ARITHMETIC, arithmetic
from .forks import forbid
from .health import health
from .library import MPI, raise_mpi_error, ranks_in_the_job, takes_threads
from .timeout import wait_until
from .unfinished import hold

__all__ = ["MpiCommunicator", "of_comm"]

ISSUES_COLLECTIVES = True  # lets `syncnorm.job.desync` recognize these functions

IN_PLACE = MPI.IN_PLACE


class MpiCommunicator:
    """The ranks of an `mpi4py.MPI.Comm`.

    Args:
        comm: an intracommunicator that this process is a member of (not `MPI.COMM_NULL`).
        timeout: time after which a collective raises DesyncError if other ranks have not joined it. Default: no limit.
            With a timeout, MPI's non-blocking collectives are used.

    After a call that timed out or failed in MPI, every later call on this communicator raises DesyncError, because its
    ranks may be at different calls.
    """

    unusable = ""  # why collectives raise; set on the class in a forked child

    def __init__(self, comm: MPI.Comm, timeout: timedelta | None = None):
        self.comm = comm
        self.timeout = timeout
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.health = health(comm)
        register(self)

    @property
    def takes_threads(self) -> bool:
        """Whether several threads may communicate at the same time."""
        return takes_threads()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks in place: one `MPI_Allreduce`. float16 and bfloat16 are summed in float32."""
        if listeners:
            report_call("all_reduce", [tensor], self.size)
        try:
            datatype = ARITHMETIC[tensor.dtype]
        except KeyError:
            return self._all_reduce_staged(tensor)
        if self.timeout is None and tensor.is_cpu and tensor.is_contiguous() and self.health.failure is None:
            # The path of a layer. MPI takes 2 µs for it, so every further lookup would be measurable.
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
        """Overwrite `tensor` with that of `root`: one `MPI_Bcast`."""
        if listeners:
            report_call("broadcast", [tensor], self.size)
        staged = stage(tensor)
        self._run("Bcast", message(staged), root, memory=staged)
        return write_back(tensor, staged)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks: one `MPI_Allgather`."""
        if listeners:
            report_call("all_gather", [tensor], self.size)
        staged = stage(tensor)
        gathered = staged.new_empty((self.size, *staged.shape))
        self._run("Allgather", message(staged), message(gathered), memory=(staged, gathered))
        return list(gathered.to(tensor.device).unbind(0))

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return the objects of all ranks, which are pickled: one `MPI_Allgather` of the sizes and one of the data."""
        pickled = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
        sizes = [int(size) for size in self.all_gather(torch.tensor(len(pickled), device="cpu"))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device="cpu")
        padded[: len(pickled)] = pickled
        gathered = zip(self.all_gather(padded), sizes, strict=True)
        return [pickle.loads(received[:size].numpy().tobytes()) for received, size in gathered]

    def barrier(self) -> None:
        """Wait for all ranks: one `MPI_Barrier`."""
        if listeners:
            report_call("barrier", [], self.size)
        self._run("Barrier")

    def local_rank(self) -> int:
        """Return this rank's index among those on its host: one `MPI_Comm_split_type`, which all ranks must call."""
        self._check()
        host = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        rank: int = host.Get_rank()
        host.Free()
        return rank

    def split(self, block: int) -> MpiCommunicator:
        """Return the ranks that pass the same `block`: one `MPI_Comm_split`, which all ranks must call."""
        self._check()
        return MpiCommunicator(self.comm.Split(block, self.rank), self.timeout)

    def _run(self, function: str, *arguments: Any, memory: Any = None) -> None:
        """Call an MPI function, or its non-blocking form if there is a timeout. `memory` is kept until MPI is done."""
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
        """Raise in a forked child, after the group was destroyed, and after a failure."""
        if self.unusable:
            raise RuntimeError(self.unusable)
        self.health.check()

    def _raise(self, function: str, error: Exception) -> NoReturn:
        """Refuse later calls and raise the error, as DesyncError with the location of each rank if ranks caused it."""
        if isinstance(error, MPI.Exception):
            self.health.fail(f"{self._name(function)}: {error}")
            raise_mpi_error(error, self._name(function), self.comm)
        self.health.fail(str(error))
        raise_desync(error, str(error), ranks_in_the_job(self.comm))

    def _name(self, function: str) -> str:
        return f"MPI_{function} on rank {self.rank} of {self.size}"

    def __repr__(self) -> str:
        return f"MpiCommunicator(rank={self.rank}, size={self.size})"


_made: weakref.WeakValueDictionary[int, MpiCommunicator] = weakref.WeakValueDictionary()  # by MPI handle


def of_comm(comm: MPI.Comm) -> MpiCommunicator:
    """Return the communicator of an MPI.Comm: always the same object for the same `comm`."""
    if comm == MPI.COMM_NULL:
        raise ValueError(
            f"expected an MPI communicator that this rank is a member of, got MPI.COMM_NULL on rank "
            f"{MPI.COMM_WORLD.rank} of MPI.COMM_WORLD"
        )
    made = _made.get(comm.handle)
    if made is None or made.comm != comm:  # MPI reuses handles after Free
        _made[comm.handle] = made = MpiCommunicator(comm)
    return made


forbid(MpiCommunicator)
