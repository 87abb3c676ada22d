"""mpi4py as a backend of torch.distributed, under the name "mpi4py".

PyTorch's wheels carry no MPI backend. Importing this module registers one. `syncnorm.init("mpi")` does, and makes it
the default group; so does `torch.distributed.init_process_group("mpi4py")` after the import, which all ranks do: it
broadcasts where torch.distributed is to meet. All calls become MPI's non-blocking ones, so synchronous calls of one
rank meet asynchronous calls of another, as in torch.distributed. A collective on tensors of any strides, dtype and
device passes through contiguous memory where it has to (`syncnorm.communicators.messages`).

The ranks of torch.distributed are those of MPI.COMM_WORLD. A subgroup is made by `MPI_Comm_create_group`, which only
its members call.
"""

# The methods that torch calls have its names and overloads, and are documented there.
# ruff: noqa: D102, N802
# mypy: disable-error-code="override, assignment, no-untyped-call"

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp
from torch.futures import Future

from .communicators.library import MPI, raise_of_mpi, ranks_in_the_job
from .communicators.messages import arithmetic, message, stage, wait_until
from .communicators.mpi import MpiCommunicator
from .communicators.process_group import DESTROYED
from .communicators.staging import write_back
from .rendezvous import tell_over_mpi
from .roll_call import raise_desync

__all__ = ["BACKEND", "MpiProcessGroup", "MpiWork"]

BACKEND = "mpi4py"
OPERATIONS = {
    ReduceOp.SUM: MPI.SUM,
    ReduceOp.AVG: MPI.SUM,  # and a division
    ReduceOp.MIN: MPI.MIN,
    ReduceOp.MAX: MPI.MAX,
    ReduceOp.PRODUCT: MPI.PROD,
    ReduceOp.BAND: MPI.BAND,
    ReduceOp.BOR: MPI.BOR,
    ReduceOp.BXOR: MPI.BXOR,
}
BITWISE = {ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR}
ORDERED = {ReduceOp.MIN, ReduceOp.MAX}
OF_BOOLEANS = {
    **dict.fromkeys([ReduceOp.SUM, ReduceOp.MAX, ReduceOp.BOR], MPI.LOR),
    **dict.fromkeys([ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.BAND], MPI.LAND),
    ReduceOp.BXOR: MPI.LXOR,
}
NO_TIME = timedelta(0)

Started = tuple[MPI.Request, Callable[[], Any]]  # a request, and what to do when it is complete


class MpiWork(dist.Work):
    """A collective under way: non-blocking MPI requests, and what to do with the memory they fill.

    Args:
        name: of the collective and where it runs, for errors.
        started: requests, and what to do with the memory of each when all are complete.
        result: the tensors that `result` and `get_future` give.
        timeout: after which `wait` raises.
        comm: whose ranks take part.
    """

    def __init__(
        self,
        name: str,
        started: Sequence[Started],
        result: list[Tensor],
        timeout: timedelta,
        comm: MPI.Comm,
    ):
        super().__init__()
        self.name = name
        self.comm = comm
        self.started = started
        self.tensors = result
        self.timeout = timeout
        self.done = False
        self.error: BaseException | None = None
        self.status = MPI.Status()

    def is_completed(self) -> bool:
        """Return whether the result is there, or will never be; makes progress, does not block."""
        if not self.done and self.error is None:
            try:
                if len(self.started) == 1:
                    ready = self.started[0][0].Test(self.status)
                else:
                    ready = MPI.Request.Testall([request for request, _ in self.started])
                if ready:
                    for _, finish in self.started:
                        finish()
                    self.done = True
            except Exception as error:
                self.error = error
        return self.done or self.error is not None

    def is_success(self) -> bool:
        """Return whether the collective has ended without an error."""
        return self.is_completed() and self.error is None

    def exception(self) -> BaseException | None:
        """Return the error that `wait` raises, if there is one yet."""
        return self.error

    def wait(self, timeout: timedelta = NO_TIME) -> bool:
        """Return True when the result is there; raise what MPI reported, or DesyncError."""
        try:
            wait_until(self.is_completed, timeout or self.timeout, self.name, self)
        except TimeoutError as error:
            self.error = error
            raise_desync(error, str(error), ranks_in_the_job(self.comm))
        if isinstance(self.error, MPI.Exception):
            raise_of_mpi(self.error, self.name, self.comm)
        if self.error is not None:
            raise self.error
        return True

    def result(self) -> list[Tensor]:
        """Return the tensors that the collective wrote to, when it has."""
        self.wait()
        return self.tensors

    def get_future(self) -> Future[list[Tensor]]:
        """Return a future of the result, which is there already: MPI moves data only in calls, so this waits for it."""
        future: Future[list[Tensor]] = Future()
        try:
            self.wait()
        except Exception as error:
            future.set_exception(error)  # type: ignore[arg-type]
        else:
            future.set_result(self.tensors)
        return future

    def _source_rank(self) -> int:
        source: int = self.status.Get_source()
        return source


class MpiProcessGroup(dist.ProcessGroup):
    """The collectives and point-to-point calls of torch.distributed on the ranks of an mpi4py communicator.

    torch calls the methods; their names and signatures are those of its C++ class. What MPI cannot do raises, naming
    it.

    Args:
        comm: an intracommunicator, for this group's use alone.
        timeout: after which a call whose peers do not come raises.
    """

    def __init__(self, comm: MPI.Comm, timeout: timedelta):
        super().__init__(comm.Get_rank(), comm.Get_size())  # type: ignore[call-arg]
        self.comm = comm
        self.communicator = MpiCommunicator(comm.Dup())  # straight to MPI; its calls cannot meet those of `comm`
        self.timeout = timeout
        self.description = ""
        self.setGroupName("")
        self.under_way: list[MpiWork] = []  # held here, since torch's C++ holds no Python object

    # fmt: off
    def getBackendName(self) -> str: return BACKEND
    def rank(self) -> int: return self.communicator.rank  # torch's own takes 0.8 µs
    def size(self) -> int: return self.communicator.size
    def getGroupName(self) -> str: return self.torch_name
    def setGroupDesc(self, description: str) -> None: self.description = description
    def getGroupDesc(self) -> str: return self.description
    def set_timeout(self, timeout: timedelta) -> None: self.timeout = timeout
    # fmt: on

    def setGroupName(self, name: str) -> None:
        self.torch_name = name
        self.where = f"on rank {self.rank()} of {self.size()} of group {name or 'default'}"

    def shutdown(self) -> None:
        """Refuse what layers would send. Free nothing: MPI_Comm_free is collective, and ranks may leave one by one."""
        self.communicator.unusable = DESTROYED

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> MpiWork:
        return self._work("all_reduce", opts, tensors, [self._all_reduce(t, opts.reduceOp) for t in tensors])

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: Sequence[Tensor], opts: Any) -> MpiWork:
        return self._work("broadcast", opts, tensors, [self._broadcast(t, opts.rootRank) for t in tensors])

    def reduce(self, tensors: Sequence[Tensor], opts: Any) -> MpiWork:
        started = [self._reduce(t, opts.rootRank, opts.reduceOp) for t in tensors]
        return self._work("reduce", opts, tensors, started)

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None) -> MpiWork:
        started = [self._all_gather(out, t) for out, t in zip(outputs, inputs, strict=True)]
        return self._work("all_gather", opts, [t for out in outputs for t in out], started)

    def allgather_coalesced(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> MpiWork:
        return self.allgather(list(zip(*outputs, strict=True)), inputs, opts)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> MpiWork:
        return self._work("all_gather_into_tensor", opts, [output], [self._all_gather_single(output, input)])

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any) -> MpiWork:
        started = [self._all_gather_single(out, t) for out, t in zip(outputs, inputs, strict=True)]
        return self._work("all_gather_into_tensor", opts, outputs, started)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def gather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> MpiWork:
        out = outputs[0] if outputs else []
        return self._work("gather", opts, out, [self._gather(out, inputs[0], opts.rootRank)])

    def scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> MpiWork:
        parts = inputs[0] if inputs else []
        return self._work("scatter", opts, outputs, [self._scatter(outputs[0], parts, opts.rootRank)])

    def reduce_scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> MpiWork:
        started = [self._reduce_scatter(out, parts, opts.reduceOp) for out, parts in zip(outputs, inputs, strict=True)]
        return self._work("reduce_scatter", opts, outputs, started)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any) -> MpiWork:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any
    ) -> MpiWork:
        parts = [t.reshape(self.size(), -1).unbind(0) for t in inputs]
        started = [self._reduce_scatter(out, p, opts.reduceOp) for out, p in zip(outputs, parts, strict=True)]
        return self._work("reduce_scatter_tensor", opts, outputs, started)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any) -> MpiWork:
        return self._work("all_to_all", opts, outputs, [self._all_to_all(outputs, inputs)])

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int], opts: Any = None
    ) -> MpiWork:
        outputs = output.split(list(output_sizes) or len(output) // self.size() or 1)
        inputs = input.split(list(input_sizes) or len(input) // self.size() or 1)
        return self._work("all_to_all_single", opts, [output], [self._all_to_all(outputs, inputs)])

    alltoall_base = all_to_all_single

    def send(self, tensors: Sequence[Tensor], destination: int, tag: int) -> MpiWork:
        staged = [stage(t) for t in tensors]
        started = [(self.comm.Isend(message(s), destination, tag), lambda s=s: s) for s in staged]
        return self._work(f"send to rank {destination}", None, tensors, started)

    def recv(self, tensors: Sequence[Tensor], source: int, tag: int) -> MpiWork:
        staged = [stage(t) for t in tensors]
        pairs = zip(tensors, staged, strict=True)
        started = [(self.comm.Irecv(message(s), source, tag), lambda t=t, s=s: write_back(t, s)) for t, s in pairs]
        return self._work("recv" if source < 0 else f"recv from rank {source}", None, tensors, started)

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int) -> MpiWork:
        return self.recv(tensors, MPI.ANY_SOURCE, tag)

    def barrier(self, opts: Any = None) -> MpiWork:
        return self._work("barrier", opts, [], [(self.comm.Ibarrier(), lambda: None)])

    def _work(self, name: str, opts: Any, result: Sequence[Tensor], started: Sequence[Started]) -> MpiWork:
        given = NO_TIME if opts is None else opts.timeout  # less than none where the caller gave no timeout
        limit = given if given > NO_TIME else self.timeout
        work = MpiWork(f"{name} {self.where}", started, list(result), limit, self.comm)
        self.under_way = [other for other in self.under_way if not other.is_completed()]
        self.under_way.append(work)
        return work

    # One MPI call each. Staged tensors are kept by what is done at the end.

    def _all_reduce(self, tensor: Tensor, op: Any) -> Started:
        staged, datatype, operation, average = self._reducible(tensor, op)
        request = self.comm.Iallreduce(MPI.IN_PLACE, message(staged, datatype), operation)
        return request, lambda: write_back(tensor, average(staged))

    def _broadcast(self, tensor: Tensor, root: int) -> Started:
        staged = stage(tensor)
        return self.comm.Ibcast(message(staged), root), lambda: write_back(tensor, staged)

    def _reduce(self, tensor: Tensor, root: int, op: Any) -> Started:
        staged, datatype, operation, average = self._reducible(tensor, op)
        if self.rank() != root:
            return self.comm.Ireduce(message(staged, datatype), None, operation, root), lambda: staged
        request = self.comm.Ireduce(MPI.IN_PLACE, message(staged, datatype), operation, root)
        return request, lambda: write_back(tensor, average(staged))

    def _all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> Started:
        staged, gathered = stage(tensor), _Parts(outputs)
        return self.comm.Iallgatherv(message(staged), gathered.message), lambda: (staged, gathered.write_back())

    def _all_gather_single(self, output: Tensor, tensor: Tensor) -> Started:
        gathered = stage(output)
        own = gathered.flatten().chunk(self.size())[self.rank()]  # fully_shard has it there, and MPI forbids aliases
        stage(write_back(own, tensor.reshape(own.shape)))  # on a GPU, MPI waits for the copy
        return self.comm.Iallgather(MPI.IN_PLACE, message(gathered)), lambda: write_back(output, gathered)

    def _gather(self, outputs: Sequence[Tensor], tensor: Tensor, root: int) -> Started:
        staged = stage(tensor)
        if self.rank() != root:
            return self.comm.Igatherv(message(staged), None, root), lambda: staged
        gathered = _Parts(outputs)
        return self.comm.Igatherv(message(staged), gathered.message, root), lambda: (staged, gathered.write_back())

    def _scatter(self, output: Tensor, inputs: Sequence[Tensor], root: int) -> Started:
        staged = stage(output)
        parts = _Parts(inputs) if self.rank() == root else None
        request = self.comm.Iscatterv(parts and parts.message, message(staged), root)
        return request, lambda: (parts, write_back(output, staged))

    def _reduce_scatter(self, output: Tensor, inputs: Sequence[Tensor], op: Any) -> Started:
        staged, datatype, operation, average = self._reducible(output, op)
        parts = _Parts(inputs, staged.dtype)
        request = self.comm.Ireduce_scatter(
            message(parts.flat, datatype), message(staged, datatype), parts.counts, operation
        )
        return request, lambda: (parts, write_back(output, average(staged)))

    def _all_to_all(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Started:
        sent, received = _Parts(inputs), _Parts(outputs)
        return self.comm.Ialltoallv(sent.message, received.message), lambda: (sent, received.write_back())

    def _reducible(self, tensor: Tensor, op: Any) -> tuple[Tensor, MPI.Datatype, MPI.Op, Callable[[Tensor], Tensor]]:
        """Return memory that MPI computes with, its datatype, the operation, and the division that an average needs."""
        dtype, datatype, operation, averages = _reduction(int(op.op), tensor.dtype)
        return stage(tensor, dtype), datatype, operation, self._divide if averages else _leave

    def _divide(self, total: Tensor) -> Tensor:
        return total.div_(self.communicator.size)


def _leave(total: Tensor) -> Tensor:
    return total


@functools.cache
def _reduction(number: int, dtype: torch.dtype) -> tuple[torch.dtype, MPI.Datatype, MPI.Op, bool]:
    """Return the dtype in which MPI reduces `dtype`, its datatype, the operation, and whether a division follows.

    The operation is told by its number: torch's enumerations take a microsecond to hash and compare.
    """
    kind = ReduceOp.RedOpType(number)
    if kind not in OPERATIONS:
        raise NotImplementedError(f"{kind.name} is no reduction of the {BACKEND} backend")
    if dtype == torch.bool:
        if kind not in OF_BOOLEANS:
            raise TypeError(f"expected numbers to take {kind.name} of, got torch.bool")
        return dtype, MPI.C_BOOL, OF_BOOLEANS[kind], False
    if kind in BITWISE and (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(f"expected integers to take {kind.name} of, got {dtype}")
    if kind == ReduceOp.AVG and not (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(f"expected a floating-point tensor to take AVG of, got {dtype}")
    if kind in ORDERED and dtype.is_complex:
        raise TypeError(f"expected real numbers to take {kind.name} of, got {dtype}")
    return *arithmetic(dtype), OPERATIONS[kind], kind == ReduceOp.AVG


class _Parts:
    """Tensors, one for each rank, of any sizes, side by side in memory."""

    def __init__(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None):
        self.tensors = tensors
        self.counts = [t.numel() for t in tensors]
        self.flat = torch.cat([stage(t, dtype).flatten() for t in tensors])
        buffer, datatype = message(self.flat)
        self.message = [buffer, self.counts, datatype]

    def write_back(self) -> list[Tensor]:
        """Copy what MPI left here to the tensors."""
        parts = zip(self.tensors, self.flat.split(self.counts), strict=True)
        return [write_back(tensor, part.view(tensor.shape)) for tensor, part in parts]


def _create(options: Any, _: Any) -> MpiProcessGroup:
    """Make the group that torch.distributed asks for; called by its members alone."""
    world = MPI.COMM_WORLD
    ranks = list(options.global_ranks_in_group) or list(range(world.Get_size()))
    if options.group_size != len(ranks) or world.Get_rank() != ranks[options.group_rank]:
        raise RuntimeError(
            f"expected torch.distributed's ranks to be those of MPI.COMM_WORLD, got rank {options.group_rank} of "
            f"{options.group_size} on rank {world.Get_rank()} of {world.Get_size()}"
        )
    tag = zlib.crc32(str(options.group_id).encode()) % 2**15  # tells groups apart that are made at the same time
    return MpiProcessGroup(world.Create_group(world.Get_group().Incl(ranks), tag), options.timeout)


dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu", "cuda"])
tell_over_mpi(MPI.COMM_WORLD)
