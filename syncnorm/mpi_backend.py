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
# ruff: noqa: D102, N802, N803
# mypy: disable-error-code="override, assignment, no-untyped-call, no-any-return"

from __future__ import annotations

import functools
import os
import time
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, Backend
from torch.distributed import ReduceOp
from torch.futures import Future

from .communicators import under_way
from .communicators.library import MPI, raise_of_mpi, ranks_in_the_job
from .communicators.messages import arithmetic, message, overdue, stage, wait_until
from .communicators.mpi import MpiCommunicator
from .communicators.process_group import DESTROYED
from .communicators.staging import write_back
from .communicators.standing import Standing, share
from .errors import DesyncError
from .rendezvous import tell_over_mpi
from .roll_call import raise_desync

__all__ = ["BACKEND", "MpiProcessGroup", "MpiWork"]

BACKEND = "mpi4py"
DEVICES = ["cpu", "cuda"]
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
is_profiled = torch._C._autograd._profiler_enabled
MOMENT = 0.01  # seconds in which most works are complete; a thread would take the time from the backward pass

Started = tuple[MPI.Request, Callable[[], Any]]  # a request, and what to do when it is complete


class MpiWork(dist.Work):
    """A collective under way: non-blocking MPI requests, and what to do with the memory they fill.

    It is held until MPI is done with it, also when nobody waits for it and its group is destroyed.

    Args:
        name: of the collective and where it runs, for errors.
        started: requests, and what to do with the memory of each when all are complete.
        result: the tensors that `result` and `get_future` give.
        timeout: after which `wait` raises.
        comm: whose ranks take part.
        standing: of its group.
        record: the profiler's, which ends with the collective.
    """

    def __init__(
        self,
        name: str,
        started: Sequence[Started],
        result: list[Tensor],
        timeout: timedelta,
        comm: MPI.Comm,
        standing: Standing,
        record: Any = None,
    ):
        super().__init__()
        self.name = name
        self.comm = comm
        self.standing = standing
        self.started = started
        self.tensors = result
        self.timeout = timeout
        self.over = False  # MPI is done with it
        self.error: BaseException | None = None
        self.status = MPI.Status()
        self.record = record
        self.advancing = Lock()  # since a thread makes progress for futures
        under_way.hold(self._advance, self)

    def _advance(self) -> bool:
        """Return whether MPI is done with the requests; makes progress, does not block."""
        if not self.over and self.advancing.acquire(blocking=False):
            try:
                if not self.over:
                    self._test()
            finally:
                self.advancing.release()
        return self.over

    def _test(self) -> None:
        started = self.started
        try:
            if len(started) == 1:
                over = started[0][0].Test(self.status)
            else:
                over = MPI.Request.Testall([request for request, _ in started])
            if not over:
                return
            if self.error is None:
                for _, finish in started:
                    finish()
        except Exception as error:
            self._fail(error, f"{self.name}: {error}")
            if len(started) > 1:
                under_way.hold(lambda: False, started)  # the error was one request's
        self.over = True
        self.started = ()
        under_way.release(self)
        if self.record is not None:
            self.record.__exit__(None, None, None)

    def _fail(self, error: BaseException, what: str) -> None:
        """End in an error. What follows on this communicator may meet other calls of the peers."""
        self.error = error
        if isinstance(error, MPI.Exception | TimeoutError):
            self.standing.fail(what)

    def is_completed(self) -> bool:
        """Return whether the result is there, or will never be; makes progress, does not block."""
        return self._advance() or self.error is not None

    def is_success(self) -> bool:
        """Return whether the collective has ended without an error."""
        return self.is_completed() and self.error is None

    def exception(self) -> BaseException | None:
        """Return the error that `wait` raises, if there is one yet."""
        return self.error

    def wait(self, timeout: timedelta = NO_TIME) -> bool:
        """Return True when the result is there; raise what MPI reported, or DesyncError."""
        if not self.is_completed():
            self.standing.check()
            try:
                wait_until(self.is_completed, timeout or self.timeout, self.name)
            except TimeoutError as error:
                self._fail(error, str(error))
        try:
            if isinstance(self.error, TimeoutError):
                raise_desync(self.error, str(self.error), ranks_in_the_job(self.comm))
            if isinstance(self.error, MPI.Exception):
                raise_of_mpi(self.error, self.name, self.comm)
        except DesyncError as desync:  # the roll is called once
            self.error = desync
        if self.error is not None:
            raise self.error
        return True

    def result(self) -> list[Tensor]:
        """Return the tensors that the collective wrote to, when it has."""
        self.wait()
        return self.tensors

    def get_future(self) -> Future[list[Tensor]]:
        """Return a future of the result."""
        return _Future(self)

    def _source_rank(self) -> int:
        source: int = self.status.Get_source()
        return source


class _Future(Future[list[Tensor]]):
    """The future of a work.

    Callbacks run in the thread that adds them, which waits for the work: what they communicate, as PowerSGD's do, is
    then in one order on all ranks. C++, such as DistributedDataParallel's, waits without Python. Works that are not
    complete after a moment are watched by a thread, where MPI allows that.
    """

    def __init__(self, work: MpiWork):
        super().__init__()
        self.work = work
        self.settling = Lock()
        until = time.monotonic() + MOMENT
        while not self._settled() and time.monotonic() < until:
            os.sched_yield()
        if not self._settled():
            if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
                self._settle()
            else:
                self.deadline = time.monotonic() + work.timeout.total_seconds()
                under_way.watch(self._settled_in_time)

    def _settled_in_time(self) -> bool:
        if not self._settled() and time.monotonic() > self.deadline:
            self.work._fail(error := TimeoutError(overdue(self.work.name, self.work.timeout)), str(error))
        return self._settled()

    def _settled(self) -> bool:
        """Return whether the result or the error is there; does not wait for it."""
        if self.work.is_completed():
            self._settle()
        return super().done()

    def _settle(self) -> None:
        with self.settling:
            if super().done():
                return
            try:
                self.work.wait()
            except Exception as error:
                self.set_exception(error)  # type: ignore[arg-type]
            else:
                self.set_result(self.work.tensors)

    def done(self) -> bool:
        return self._settled()

    def wait(self) -> list[Tensor]:
        self._settle()
        return super().wait()

    def value(self) -> list[Tensor]:
        self._settled()
        return super().value()

    def then(self, callback: Callable[[Future[list[Tensor]]], Any]) -> Future[Any]:
        self._settle()
        return super().then(callback)

    def add_done_callback(self, callback: Callable[[Future[list[Tensor]]], None]) -> None:
        self._settle()
        super().add_done_callback(callback)


def _call(options: type, *tensors: str, rest: str = "timeout", lists: bool = True) -> Callable[[Any], Any]:
    """Give a method of tensors and options, as C++ calls it, the other forms of torch's own.

    Args:
        options: the class of its options.
        tensors: the names of its arguments before the options; of one, "tensors|tensor", in the different forms.
        rest: the names of what may be given in place of the options, in this order: fields of the options.
        lists: whether a lone tensor stands for a list of one.
    """
    fields = {"op": "reduceOp", "root": "rootRank", "timeout": "timeout"}
    names = {name: place for place, alternatives in enumerate(tensors) for name in alternatives.split("|")}
    given_as = rest.split()
    scalars = int | timedelta | ReduceOp | ReduceOp.RedOpType | None

    def canonical(method: str, *args: Any, **keywords: Any) -> list[Any]:
        given = dict(enumerate(args[: len(tensors)]))
        opts, values = options(), dict(zip(given_as, args[len(tensors) :], strict=False))
        if "opts" in keywords or (values and not isinstance(args[len(tensors)], scalars)):
            opts, values = keywords.pop("opts", None) or args[len(tensors)], {}
        for name, value in keywords.items():
            if name in names and names[name] not in given:
                given[names[name]] = value
            elif name in given_as and name not in values:
                values[name] = value
            else:
                raise TypeError(f"{method}() got an unexpected argument {name!r}, or got it twice")
        missing = [name for place, name in enumerate(tensors) if place not in given]
        if missing or len(args) > len(tensors) + len(given_as):
            raise TypeError(f"{method}() expected {', '.join(tensors)} and {rest} or opts, got {len(args)} arguments")
        for name, value in values.items():
            if value is not None:
                setattr(opts, fields[name], value)
        ordered = [given[place] for place in range(len(tensors))]
        if lists and any(isinstance(value, Tensor) for value in ordered):
            ordered = [[value] for value in ordered]
        return [*ordered, opts]

    def decorate(method: Any) -> Any:
        count = len(tensors) + 1

        @functools.wraps(method)
        def call(self: MpiProcessGroup, *args: Any, **keywords: Any) -> Any:
            if len(args) != count or type(args[-1]) is not options:
                args = tuple(canonical(method.__name__, *args, **keywords))
            return method(self, *args)

        return call

    return decorate


class MpiProcessGroup(dist.ProcessGroup):
    """The collectives and point-to-point calls of torch.distributed on the ranks of an mpi4py communicator.

    torch calls the methods; their names and signatures are those of its C++ class. What MPI cannot do raises, naming
    it. After a call that failed, every later one raises DesyncError.

    Args:
        comm: an intracommunicator, for this group's use alone.
        timeout: after which a call whose peers do not come raises.
        store: torch's, that the group was made with.
    """

    supports_splitting = supports_coalescing = supports_time_estimate = False

    def __init__(self, comm: MPI.Comm, timeout: timedelta, store: Any = None):
        super().__init__(comm.Get_rank(), comm.Get_size())  # type: ignore[call-arg]
        self.all = comm
        self.communicator = MpiCommunicator(comm.Dup())  # straight to MPI; its calls cannot meet those of `comm`
        self.standing = self.communicator.standing
        share(self.standing, comm)  # one fails with the other
        self.timeout = timeout
        self.store = store
        self.description = ""
        self.sequence_number = 0  # of collectives
        self.barriers = 0  # of monitored ones
        self.setGroupName("")
        for device in DEVICES:
            self._register_backend(torch.device(device), dist.ProcessGroup.BackendType.CUSTOM, None)

    # fmt: off
    def getBackendName(self) -> str: return BACKEND
    def rank(self) -> int: return self.communicator.rank  # torch's own takes 0.8 µs
    def size(self) -> int: return self.communicator.size
    def getGroupName(self) -> str: return self.torch_name
    def setGroupDesc(self, description: str) -> None: self.description = description
    def getGroupDesc(self) -> str: return self.description
    def set_timeout(self, timeout: timedelta) -> None: self.timeout = timeout
    def get_group_store(self) -> Any: return self.store
    def _get_backend(self, device: torch.device) -> MpiProcessGroup: return self
    def _get_sequence_number_for_group(self) -> int: return self.sequence_number
    def _set_sequence_number_for_group(self) -> None: self.sequence_number = 0
    # fmt: on

    @property
    def comm(self) -> MPI.Comm:
        """The MPI communicator; DesyncError after a call that failed."""
        self.standing.check()
        return self.all

    @property
    def options(self) -> Any:
        return Backend.Options(BACKEND, self.timeout)

    def setGroupName(self, name: str) -> None:
        self.torch_name = name
        self.where = f"on rank {self.rank()} of {self.size()} of group {name or 'default'}"

    def shutdown(self) -> None:
        """Refuse what layers would send. Free nothing: MPI_Comm_free is collective, and ranks may leave one by one."""
        self.communicator.unusable = DESTROYED

    def abort(self) -> None:
        """Let later calls raise; MPI has no way to end those under way."""
        self.standing.fail(f"abort {self.where}")

    @_call(dist.AllreduceOptions, "tensors|tensor", rest="op timeout")
    def allreduce(self, tensors: Sequence[Tensor], opts: Any) -> MpiWork:
        if tensors and tensors[0].is_sparse:
            return self._work("all_reduce", opts, tensors, lambda: self._all_reduce_sparse(tensors, opts))
        return self._work("all_reduce", opts, tensors, lambda: [self._all_reduce(t, opts.reduceOp) for t in tensors])

    @_call(dist.AllreduceCoalescedOptions, "tensors|tensor", rest="op timeout")
    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any) -> MpiWork:
        return self._work("all_reduce", opts, tensors, lambda: [self._all_reduce(t, opts.reduceOp) for t in tensors])

    @_call(dist.BroadcastOptions, "tensors|tensor", rest="root timeout")
    def broadcast(self, tensors: Sequence[Tensor], opts: Any) -> MpiWork:
        return self._work("broadcast", opts, tensors, lambda: [self._broadcast(t, opts.rootRank) for t in tensors])

    @_call(dist.ReduceOptions, "tensors|tensor", rest="root op timeout")
    def reduce(self, tensors: Sequence[Tensor], opts: Any) -> MpiWork:
        return self._work(
            "reduce", opts, tensors, lambda: [self._reduce(t, opts.rootRank, opts.reduceOp) for t in tensors]
        )

    @_call(AllgatherOptions, "output_tensors", "input_tensors|input_tensor")
    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> MpiWork:
        return self._work(
            "all_gather",
            opts,
            [t for out in outputs for t in out],
            lambda: [self._all_gather(out, t) for out, t in zip(outputs, inputs, strict=True)],
        )

    @_call(AllgatherOptions, "output_lists", "input_list")
    def allgather_coalesced(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> MpiWork:
        return self.allgather(list(zip(*outputs, strict=True)), inputs, opts)

    @_call(AllgatherOptions, "output", "input", lists=False)
    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any) -> MpiWork:
        return self.all_gather_single_coalesced([output], [input], opts)

    _allgather_base = all_gather_single

    @_call(AllgatherOptions, "output_lists", "input_list")
    def all_gather_single_coalesced(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any) -> MpiWork:
        return self._work(
            "all_gather_into_tensor",
            opts,
            outputs,
            lambda: [self._all_gather_single(out, t) for out, t in zip(outputs, inputs, strict=True)],
        )

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    @_call(dist.GatherOptions, "output_tensors", "input_tensors|input_tensor", rest="root timeout")
    def gather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> MpiWork:
        out = outputs[0] if outputs else []
        return self._work("gather", opts, out, lambda: [self._gather(out, inputs[0], opts.rootRank)])

    @_call(dist.ScatterOptions, "output_tensors|output_tensor", "input_tensors", rest="root timeout")
    def scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> MpiWork:
        parts = inputs[0] if inputs else []
        return self._work("scatter", opts, outputs, lambda: [self._scatter(outputs[0], parts, opts.rootRank)])

    @_call(dist.ReduceScatterOptions, "output_tensors|output", "input_tensors|input", rest="op timeout")
    def reduce_scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> MpiWork:
        return self._work(
            "reduce_scatter",
            opts,
            outputs,
            lambda: [self._reduce_scatter(out, p, opts.reduceOp) for out, p in zip(outputs, inputs, strict=True)],
        )

    @_call(dist.ReduceScatterOptions, "outputTensor", "inputTensor", rest="op timeout", lists=False)
    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any) -> MpiWork:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    _reduce_scatter_base = reduce_scatter_single

    @_call(dist.ReduceScatterOptions, "outputTensors", "inputTensors", rest="op timeout")
    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any
    ) -> MpiWork:
        for output, input in zip(outputs, inputs, strict=True):
            _refuse(input.numel() == output.numel() * self.size(), f"{output.numel()} elements per rank", input)
        parts = [t.reshape(self.size(), -1).unbind(0) for t in inputs]
        return self._work(
            "reduce_scatter_tensor",
            opts,
            outputs,
            lambda: [self._reduce_scatter(out, p, opts.reduceOp) for out, p in zip(outputs, parts, strict=True)],
        )

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    @_call(dist.AllToAllOptions, "output_tensors|output_tensor|output", "input_tensors|input_tensor|input")
    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any) -> MpiWork:
        return self._work("all_to_all", opts, outputs, lambda: [self._all_to_all(outputs, inputs)])

    @_call(
        dist.AllToAllOptions,
        *("output|output_tensor", "input|input_tensor", "output_split_sizes", "input_split_sizes"),
        lists=False,
    )
    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int], opts: Any
    ) -> MpiWork:
        outputs, inputs = self._split(output, output_sizes), self._split(input, input_sizes)
        return self._work("all_to_all_single", opts, [output], lambda: [self._all_to_all(outputs, inputs)])

    alltoall_base = all_to_all_single

    def send(self, tensors: Sequence[Tensor], dstRank: int, tag: int = 0) -> MpiWork:
        what = f"send to rank {dstRank}"
        return self._work(what, None, tensors, lambda: [self._send(t, dstRank, tag) for t in tensors], "send")

    def recv(self, tensors: Sequence[Tensor], srcRank: int, tag: int = 0) -> MpiWork:
        what = "recv" if srcRank < 0 else f"recv from rank {srcRank}"
        return self._work(what, None, tensors, lambda: [self._recv(t, srcRank, tag) for t in tensors], "recv")

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int = 0) -> MpiWork:
        return self.recv(tensors, MPI.ANY_SOURCE, tag)

    @_call(dist.BarrierOptions)
    def barrier(self, opts: Any) -> MpiWork:
        return self._work("barrier", opts, [], lambda: [(self.comm.Ibarrier(), lambda: None)])

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Return when all ranks have come; else rank 0 names the first that has not, or all, by `wait_all_ranks`."""
        limit = self.timeout if timeout is None else timeout
        self.barriers += 1
        tag = self.barriers % 2**15  # a message that comes too late is none of the next barrier
        self.standing.check()
        within = f"{limit.total_seconds() * 1000:g} ms"
        if self.rank() != 0:
            works = [self._tell(self.communicator.comm.Isend, 0, tag), self._tell(self.communicator.comm.Irecv, 0, tag)]
            if self._incomplete(works, limit):
                raise DesyncError(
                    f"Rank {self.rank()} successfully reached monitoredBarrier, but received errors while waiting for "
                    f"send/recv from rank 0: no answer in {within}. Please check rank 0 logs for faulty rank."
                )
            return
        if limit <= NO_TIME:
            raise DesyncError(f"Rank 0 timed out in monitoredBarrier after {within}.")
        others = range(1, self.size())
        absent = self._incomplete([self._tell(self.communicator.comm.Irecv, rank, tag) for rank in others], limit)
        if absent:
            ranks = ", ".join(str(place + 1) for place in absent[: None if wait_all_ranks else 1])
            raise DesyncError(f"Rank{'s' * (', ' in ranks)} {ranks} failed to pass monitoredBarrier in {within}")
        self._incomplete([self._tell(self.communicator.comm.Isend, rank, tag) for rank in others], limit)

    def _tell(self, function: Callable[..., MPI.Request], rank: int, tag: int) -> MpiWork:
        flag = torch.zeros(1, device="cpu")
        started = [(function(message(flag), rank, tag), lambda: flag)]
        return MpiWork(f"monitored_barrier {self.where}", started, [], self.timeout, self.all, self.standing)

    def _incomplete(self, works: list[MpiWork], limit: timedelta) -> list[int]:
        """Return the places of the works that are not complete after `limit`, at once if all are."""
        deadline = time.monotonic() + limit.total_seconds()
        while True:
            places = [place for place, work in enumerate(works) if not work.is_success()]
            if not places:
                return []
            if time.monotonic() > deadline:
                self.standing.fail(overdue(works[0].name, limit))
                return places
            os.sched_yield()

    def _work(
        self,
        name: str,
        opts: Any,
        result: Sequence[Tensor],
        start: Callable[[], list[Started]],
        title: str | None = None,
    ) -> MpiWork:
        """Start what `start` does, under a name for errors; `title` is the profiler's, of calls that name a rank."""
        record = None
        if is_profiled():
            record = torch.autograd.profiler.record_function(f"{BACKEND}:{title or name}")
            record.__enter__()
        self.sequence_number += title is None
        try:
            started = start()
        except MPI.Exception as error:
            self.standing.fail(f"{name} {self.where}: {error}")
            raise
        given = NO_TIME if opts is None else opts.timeout  # less than none where the caller gave no timeout
        limit = given if given > NO_TIME else self.timeout
        return MpiWork(f"{name} {self.where}", started, list(result), limit, self.all, self.standing, record)

    def _split(self, tensor: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        """Return the parts of a tensor, one for each rank: of these sizes along its first axis, or of equal ones."""
        even = len(tensor) // self.size()
        sizes = list(sizes) or [even] * self.size()
        _refuse(len(sizes) == self.size() and sum(sizes) == len(tensor), f"{self.size()} parts of {sizes} rows", tensor)
        return tensor.split(sizes)

    # One MPI call each. Staged tensors are kept by what is done at the end.

    def _send(self, tensor: Tensor, rank: int, tag: int) -> Started:
        staged = stage(tensor)
        return self.comm.Isend(message(staged), rank, tag), lambda: staged

    def _recv(self, tensor: Tensor, rank: int, tag: int) -> Started:
        staged = stage(tensor)
        return self.comm.Irecv(message(staged), rank, tag), lambda: write_back(tensor, staged)

    def _all_reduce(self, tensor: Tensor, op: Any) -> Started:
        staged, datatype, operation, average = self._reducible(tensor, op)
        request = self.comm.Iallreduce(MPI.IN_PLACE, message(staged, datatype), operation)
        return request, lambda: write_back(tensor, average(staged))

    def _all_reduce_sparse(self, tensors: Sequence[Tensor], opts: Any) -> list[Started]:
        """Gather the entries of all ranks and sum those that meet; the numbers of entries first, which waits."""
        (tensor,) = tensors
        if opts.reduceOp != ReduceOp.SUM:
            raise NotImplementedError("expected the SUM of a sparse tensor, got another reduction")
        own = tensor.coalesce()
        counts = torch.empty(self.size(), dtype=torch.int64, device="cpu")
        self.all_gather_single(counts, torch.tensor([own._nnz()], device="cpu")).wait()
        sizes = counts.tolist()
        indices = [own.indices().new_empty(n, own.sparse_dim()) for n in sizes]
        values = [own.values().new_empty(n, *own.values().shape[1:]) for n in sizes]
        moved = [self._all_gather(indices, own.indices().t()), self._all_gather(values, own.values())]

        def add_up() -> None:
            for _, write in moved:
                write()
            parts = torch.cat(indices).t(), torch.cat(values)
            total = torch.sparse_coo_tensor(*parts, tensor.shape, device=tensor.device, check_invariants=False)
            with torch.no_grad():
                tensor.copy_(total.coalesce())

        return [(moved[0][0], lambda: None), (moved[1][0], add_up)]

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
        self._check_parts(outputs, tensor)
        staged, gathered = stage(tensor), _Parts(outputs)
        return self.comm.Iallgatherv(message(staged), gathered.message), lambda: (staged, gathered.write_back())

    def _all_gather_single(self, output: Tensor, tensor: Tensor) -> Started:
        _refuse(output.dtype == tensor.dtype, f"an output of {tensor.dtype}, as the input", output)
        _refuse(output.numel() == tensor.numel() * self.size(), f"{tensor.numel()} elements for each rank", output)
        gathered = stage(output)
        own = gathered.flatten().chunk(self.size())[self.rank()]  # fully_shard has it there, and MPI forbids aliases
        stage(write_back(own, tensor.reshape(own.shape)))  # on a GPU, MPI waits for the copy
        return self.comm.Iallgather(MPI.IN_PLACE, message(gathered)), lambda: write_back(output, gathered)

    def _gather(self, outputs: Sequence[Tensor], tensor: Tensor, root: int) -> Started:
        staged = stage(tensor)
        if self.rank() != root:
            return self.comm.Igatherv(message(staged), None, root), lambda: staged
        self._check_parts(outputs, tensor)
        gathered = _Parts(outputs)
        return self.comm.Igatherv(message(staged), gathered.message, root), lambda: (staged, gathered.write_back())

    def _scatter(self, output: Tensor, inputs: Sequence[Tensor], root: int) -> Started:
        staged = stage(output)
        if self.rank() == root:
            self._check_parts(inputs, output)
        parts = _Parts(inputs) if self.rank() == root else None
        request = self.comm.Iscatterv(parts and parts.message, message(staged), root)
        return request, lambda: (parts, write_back(output, staged))

    def _reduce_scatter(self, output: Tensor, inputs: Sequence[Tensor], op: Any) -> Started:
        staged, datatype, operation, average = self._reducible(output, op)
        self._check_parts(inputs, output)
        parts = _Parts(inputs, staged.dtype)
        request = self.comm.Ireduce_scatter(
            message(parts.flat, datatype), message(staged, datatype), parts.counts, operation
        )
        return request, lambda: (parts, write_back(output, average(staged)))

    def _all_to_all(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Started:
        self._check_parts(inputs, outputs[self.rank()])
        self._check_parts(outputs, inputs[self.rank()])
        sent, received = _Parts(inputs), _Parts(outputs)
        return self.comm.Ialltoallv(sent.message, received.message), lambda: (sent, received.write_back())

    def _check_parts(self, parts: Sequence[Tensor], own: Tensor) -> None:
        """Refuse parts that are not one for each rank, not of one dtype, or of which this rank's is not as large."""
        if len(parts) != self.size():
            raise ValueError(f"expected a tensor for each of {self.size()} ranks, got {len(parts)}")
        for part in parts:
            _refuse(part.dtype == own.dtype, f"tensors of one dtype, {own.dtype}", part)
        mine = parts[self.rank()]
        _refuse(mine.numel() == own.numel(), f"{own.numel()} elements for rank {self.rank()}", mine)

    def _reducible(self, tensor: Tensor, op: Any) -> tuple[Tensor, MPI.Datatype, MPI.Op, Callable[[Tensor], Tensor]]:
        """Return memory that MPI computes with, its datatype, the operation, and the division that an average needs."""
        dtype, datatype, operation, averages = _reduction(int(op.op), tensor.dtype)
        return stage(tensor, dtype), datatype, operation, self._divide if averages else _leave

    def _divide(self, total: Tensor) -> Tensor:
        return total.div_(self.communicator.size)


def _refuse(right: bool, expected: str, tensor: Tensor) -> None:
    if not right:
        raise ValueError(f"expected {expected}, got a tensor of shape {tuple(tensor.shape)} and {tensor.dtype}")


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
    return MpiProcessGroup(world.Create_group(world.Get_group().Incl(ranks), tag), options.timeout, options.store)


def _leave_out_of_graphs(*classes: type) -> None:
    """Let torch.compile trace nothing of these, which C++ calls inside of compiled regions."""
    dynamo = torch._C._dynamo.eval_frame
    if not hasattr(dynamo, "set_code_exec_strategy"):  # added to torch after 2.6
        return
    skip = dynamo._FrameExecStrategy(dynamo._FrameAction.SKIP, dynamo._FrameAction.SKIP)
    for cls in classes:
        for function in vars(cls).values():
            if hasattr(function, "__code__"):
                dynamo.set_code_exec_strategy(function.__code__, skip)


_leave_out_of_graphs(MpiWork, _Future, MpiProcessGroup)
dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=DEVICES)
tell_over_mpi(MPI.COMM_WORLD)
