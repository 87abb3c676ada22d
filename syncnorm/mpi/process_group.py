"""The collectives of torch.distributed on mpi4py.

All calls use MPI's non-blocking functions, so a synchronous call on one rank matches an asynchronous call on another,
as in torch.distributed. Tensors of any strides, dtype and device are supported. They are copied to contiguous memory
where necessary (`syncnorm.mpi.buffers`).

The ranks of torch.distributed are those of MPI.COMM_WORLD. A subgroup is created by `MPI_Comm_create_group`, which only
its members call.
"""

# torch calls these methods. They have its names and overloads, and are documented there.
# ruff: noqa: D102, N802, N803
# mypy: disable-error-code="override, assignment, no-untyped-call, no-any-return"

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, Backend
from torch.distributed import ReduceOp

from ..communicators import register_group_type
from ..communicators.contiguous import write_back
from ..communicators.listeners import listeners, report_call, unreported
from ..communicators.process_group import DESTROYED
from ..errors import DesyncError
from .buffers import message, stage
from .communicator import MpiCommunicator
from .health import share
from .library import MPI
from .parts import Parts
from .reductions import reduction
from .signatures import torch_signatures
from .timeout import overdue
from .work import NO_TIME, MpiWork, Started

__all__ = ["BACKEND", "DEVICES", "MpiProcessGroup"]

ISSUES_COLLECTIVES = True  # lets `syncnorm.job.desync` recognize these functions

BACKEND = "mpi4py"
DEVICES = ["cpu", "cuda"]
WORKS_KEPT, MOST_BYTES_KEPT = 16, 1024
is_profiled = torch._C._autograd._profiler_enabled


class MpiProcessGroup(dist.ProcessGroup):
    """The collectives and point-to-point calls of torch.distributed on the ranks of an mpi4py communicator.

    torch calls the methods. Their names and signatures are those of its C++ class. Operations that MPI does not support
    raise an error that names them. After a failed call, every later call raises DesyncError.

    Args:
        comm: an intracommunicator that nothing else uses.
        timeout: time after which a call raises if other ranks do not join it.
        store: torch's store that the group was created with.
    """

    supports_splitting = supports_coalescing = supports_time_estimate = False

    def __init__(self, comm: MPI.Comm, timeout: timedelta, store: Any = None):
        super().__init__(comm.Get_rank(), comm.Get_size())  # type: ignore[call-arg]
        self.all = comm
        self.communicator = MpiCommunicator(comm.Dup())  # for layers; its calls cannot be matched with those of `comm`
        self.health = self.communicator.health
        # C++ code such as that of DistributedDataParallel's join keeps a work, but not its Python part.
        self._kept: deque[MpiWork] = deque(maxlen=WORKS_KEPT)
        share(self.health, comm)  # a failure of one is a failure of both
        self.timeout = timeout
        self.store = store
        self.description = ""
        self.sequence_number = 0  # the number of collectives so far
        self.barriers = 0  # the number of monitored barriers so far
        self.setGroupName("")
        for device in DEVICES:
            self._register_backend(torch.device(device), dist.ProcessGroup.BackendType.CUSTOM, None)

    # fmt: off
    def getBackendName(self) -> str: return BACKEND
    def rank(self) -> int: return self.communicator.rank  # torch's own method takes 0.8 µs
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
        """The MPI communicator. Raises DesyncError after a failed call."""
        self.health.check()
        return self.all

    @property
    def options(self) -> Any:
        return Backend.Options(BACKEND, self.timeout)

    def setGroupName(self, name: str) -> None:
        self.torch_name = name
        self.where = f"on rank {self.rank()} of {self.size()} of group {name or 'default'}"

    def shutdown(self) -> None:
        """Make layers' collectives raise. Nothing is freed: MPI_Comm_free is collective, and ranks may leave singly."""
        self.communicator.unusable = DESTROYED

    def abort(self) -> None:
        """Make later calls raise. MPI cannot cancel collectives in progress."""
        self.health.fail(f"abort {self.where}")

    @torch_signatures(dist.AllreduceOptions, "tensors|tensor", rest="op timeout")
    def allreduce(self, tensors: Sequence[Tensor], opts: Any) -> MpiWork:
        if tensors and tensors[0].is_sparse:
            return self._work("all_reduce", opts, tensors, lambda: self._all_reduce_sparse(tensors, opts))
        return self._work("all_reduce", opts, tensors, lambda: [self._all_reduce(t, opts.reduceOp) for t in tensors])

    @torch_signatures(dist.AllreduceCoalescedOptions, "tensors|tensor", rest="op timeout")
    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any) -> MpiWork:
        return self._work("all_reduce", opts, tensors, lambda: [self._all_reduce(t, opts.reduceOp) for t in tensors])

    @torch_signatures(dist.BroadcastOptions, "tensors|tensor", rest="root timeout")
    def broadcast(self, tensors: Sequence[Tensor], opts: Any) -> MpiWork:
        return self._work("broadcast", opts, tensors, lambda: [self._broadcast(t, opts.rootRank) for t in tensors])

    @torch_signatures(dist.ReduceOptions, "tensors|tensor", rest="root op timeout")
    def reduce(self, tensors: Sequence[Tensor], opts: Any) -> MpiWork:
        return self._work(
            "reduce", opts, tensors, lambda: [self._reduce(t, opts.rootRank, opts.reduceOp) for t in tensors]
        )

    @torch_signatures(AllgatherOptions, "output_tensors", "input_tensors|input_tensor")
    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> MpiWork:
        return self._work(
            "all_gather",
            opts,
            [t for out in outputs for t in out],
            lambda: [self._all_gather(out, t) for out, t in zip(outputs, inputs, strict=True)],
            sent=inputs,
        )

    @torch_signatures(AllgatherOptions, "output_lists", "input_list")
    def allgather_coalesced(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> MpiWork:
        return self.allgather(list(zip(*outputs, strict=True)), inputs, opts)

    @torch_signatures(AllgatherOptions, "output", "input", lists=False)
    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any) -> MpiWork:
        return self.all_gather_single_coalesced([output], [input], opts)

    _allgather_base = all_gather_single

    @torch_signatures(AllgatherOptions, "output_lists", "input_list")
    def all_gather_single_coalesced(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any) -> MpiWork:
        return self._work(
            "all_gather_into_tensor",
            opts,
            outputs,
            lambda: [self._all_gather_single(out, t) for out, t in zip(outputs, inputs, strict=True)],
            sent=inputs,
        )

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    @torch_signatures(dist.GatherOptions, "output_tensors", "input_tensors|input_tensor", rest="root timeout")
    def gather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> MpiWork:
        out = outputs[0] if outputs else []
        return self._work("gather", opts, out, lambda: [self._gather(out, inputs[0], opts.rootRank)], sent=inputs)

    @torch_signatures(dist.ScatterOptions, "output_tensors|output_tensor", "input_tensors", rest="root timeout")
    def scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> MpiWork:
        parts = inputs[0] if inputs else []
        return self._work("scatter", opts, outputs, lambda: [self._scatter(outputs[0], parts, opts.rootRank)])

    @torch_signatures(dist.ReduceScatterOptions, "output_tensors|output", "input_tensors|input", rest="op timeout")
    def reduce_scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> MpiWork:
        return self._work(
            "reduce_scatter",
            opts,
            outputs,
            lambda: [self._reduce_scatter(out, p, opts.reduceOp) for out, p in zip(outputs, inputs, strict=True)],
            sent=[t for parts in inputs for t in parts],
        )

    @torch_signatures(dist.ReduceScatterOptions, "outputTensor", "inputTensor", rest="op timeout", lists=False)
    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any) -> MpiWork:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    _reduce_scatter_base = reduce_scatter_single

    @torch_signatures(dist.ReduceScatterOptions, "outputTensors", "inputTensors", rest="op timeout")
    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any
    ) -> MpiWork:
        for output, input in zip(outputs, inputs, strict=True):
            _check(input.numel() == output.numel() * self.size(), f"{output.numel()} elements per rank", input)
        parts = [t.reshape(self.size(), -1).unbind(0) for t in inputs]
        return self._work(
            "reduce_scatter_tensor",
            opts,
            outputs,
            lambda: [self._reduce_scatter(out, p, opts.reduceOp) for out, p in zip(outputs, parts, strict=True)],
            sent=inputs,
        )

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    @torch_signatures(dist.AllToAllOptions, "output_tensors|output_tensor|output", "input_tensors|input_tensor|input")
    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any) -> MpiWork:
        return self._work("all_to_all", opts, outputs, lambda: [self._all_to_all(outputs, inputs)], sent=inputs)

    @torch_signatures(
        dist.AllToAllOptions,
        *("output|output_tensor", "input|input_tensor", "output_split_sizes", "input_split_sizes"),
        lists=False,
    )
    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int], opts: Any
    ) -> MpiWork:
        outputs, inputs = self._split(output, output_sizes), self._split(input, input_sizes)
        return self._work(
            "all_to_all_single", opts, [output], lambda: [self._all_to_all(outputs, inputs)], sent=[input]
        )

    alltoall_base = all_to_all_single

    def send(self, tensors: Sequence[Tensor], dstRank: int, tag: int = 0) -> MpiWork:
        what = f"send to rank {dstRank}"
        return self._work(what, None, tensors, lambda: [self._send(t, dstRank, tag) for t in tensors], "send")

    def recv(self, tensors: Sequence[Tensor], srcRank: int, tag: int = 0) -> MpiWork:
        what = "recv" if srcRank < 0 else f"recv from rank {srcRank}"
        return self._work(what, None, tensors, lambda: [self._recv(t, srcRank, tag) for t in tensors], "recv")

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int = 0) -> MpiWork:
        return self.recv(tensors, MPI.ANY_SOURCE, tag)

    @torch_signatures(dist.BarrierOptions)
    def barrier(self, opts: Any) -> MpiWork:
        return self._work("barrier", opts, [], lambda: [(self.comm.Ibarrier(), lambda: None)])

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Return when all ranks have joined. Else rank 0 names the first missing rank, or all if `wait_all_ranks`."""
        limit = self.timeout if timeout is None else timeout
        if listeners:
            report_call("monitored_barrier", [], self.size())
        self.barriers += 1
        tag = self.barriers % 2**15  # a late message cannot match the next barrier
        self.health.check()
        within = f"{limit.total_seconds() * 1000:g} ms"
        if self.rank() != 0:
            comm = self.communicator.comm
            works = [self._exchange(comm.Isend, 0, tag), self._exchange(comm.Irecv, 0, tag)]
            if self._incomplete(works, limit):
                raise DesyncError(
                    f"Rank {self.rank()} successfully reached monitoredBarrier, but received errors while waiting for "
                    f"send/recv from rank 0: no answer in {within}. Please check rank 0 logs for faulty rank."
                )
            return
        if limit <= NO_TIME:
            raise DesyncError(f"Rank 0 timed out in monitoredBarrier after {within}.")
        others = range(1, self.size())
        missing = self._incomplete([self._exchange(self.communicator.comm.Irecv, rank, tag) for rank in others], limit)
        if missing:
            ranks = ", ".join(str(index + 1) for index in missing[: None if wait_all_ranks else 1])
            raise DesyncError(f"Rank{'s' * (', ' in ranks)} {ranks} failed to pass monitoredBarrier in {within}")
        self._incomplete([self._exchange(self.communicator.comm.Isend, rank, tag) for rank in others], limit)

    def _exchange(self, function: Callable[..., MPI.Request], rank: int, tag: int) -> MpiWork:
        flag = torch.zeros(1, device="cpu")
        started = [(function(message(flag), rank, tag), lambda: flag)]
        return MpiWork(f"monitored_barrier {self.where}", started, [], self.timeout, self.all, self.health)

    def _incomplete(self, works: list[MpiWork], limit: timedelta) -> list[int]:
        """Return the indices of the works that are not complete after `limit`. Return early if all are complete."""
        deadline = time.monotonic() + limit.total_seconds()
        while True:
            incomplete = [index for index, work in enumerate(works) if not work.is_success()]
            if not incomplete:
                return []
            if time.monotonic() > deadline:
                self.health.fail(overdue(works[0].name, limit))
                return incomplete
            os.sched_yield()

    def _work(
        self,
        name: str,
        opts: Any,
        result: Sequence[Tensor],
        start: Callable[[], list[Started]],
        title: str | None = None,
        sent: Sequence[Tensor] | None = None,
    ) -> MpiWork:
        """Call `start` and return its work.

        `name` is used in errors. `title` is the profiler's name for point-to-point calls, whose `name` has a rank.
        `sent` is this rank's input, if that is not the result.
        """
        if listeners and title is None:
            report_call(name, result if sent is None else sent, self.size())
        record = None
        if is_profiled():
            record = torch.autograd.profiler.record_function(f"{BACKEND}:{title or name}")
            record.__enter__()
        self.sequence_number += title is None
        try:
            started = start()
        except MPI.Exception as error:
            self.health.fail(f"{name} {self.where}: {error}")
            raise
        given = NO_TIME if opts is None else opts.timeout  # negative if the caller passed no timeout
        limit = given if given > NO_TIME else self.timeout
        work = MpiWork(f"{name} {self.where}", started, list(result), limit, self.all, self.health, record)
        if sum(tensor.numel() * tensor.element_size() for tensor in work.tensors) <= MOST_BYTES_KEPT:
            self._kept.append(work)
        return work

    def _split(self, tensor: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        """Split a tensor along its first axis, one part for each rank: of the given sizes, or of equal sizes."""
        even = len(tensor) // self.size()
        sizes = list(sizes) or [even] * self.size()
        _check(len(sizes) == self.size() and sum(sizes) == len(tensor), f"{self.size()} parts of {sizes} rows", tensor)
        return tensor.split(sizes)

    # Each of these issues one MPI call. The returned functions keep the staged tensors alive.

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
        """Gather the entries of all ranks and sum duplicates. Gathers their numbers first, and waits for that."""
        (tensor,) = tensors
        if opts.reduceOp != ReduceOp.SUM:
            raise NotImplementedError("expected the SUM of a sparse tensor, got another reduction")
        own = tensor.coalesce()
        counts = torch.empty(self.size(), dtype=torch.int64, device="cpu")
        with unreported():
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
        staged, gathered = stage(tensor), Parts(outputs)
        return self.comm.Iallgatherv(message(staged), gathered.message), lambda: (staged, gathered.write_back())

    def _all_gather_single(self, output: Tensor, tensor: Tensor) -> Started:
        _check(output.dtype == tensor.dtype, f"an output of {tensor.dtype}, as the input", output)
        _check(output.numel() == tensor.numel() * self.size(), f"{tensor.numel()} elements for each rank", output)
        gathered = stage(output)
        own = gathered.flatten().chunk(self.size())[self.rank()]  # fully_shard aliases it, which MPI forbids
        stage(write_back(own, tensor.reshape(own.shape)))  # on a GPU, waits for the copy
        return self.comm.Iallgather(MPI.IN_PLACE, message(gathered)), lambda: write_back(output, gathered)

    def _gather(self, outputs: Sequence[Tensor], tensor: Tensor, root: int) -> Started:
        staged = stage(tensor)
        if self.rank() != root:
            return self.comm.Igatherv(message(staged), None, root), lambda: staged
        self._check_parts(outputs, tensor)
        gathered = Parts(outputs)
        return self.comm.Igatherv(message(staged), gathered.message, root), lambda: (staged, gathered.write_back())

    def _scatter(self, output: Tensor, inputs: Sequence[Tensor], root: int) -> Started:
        staged = stage(output)
        if self.rank() == root:
            self._check_parts(inputs, output)
        parts = Parts(inputs) if self.rank() == root else None
        request = self.comm.Iscatterv(parts and parts.message, message(staged), root)
        return request, lambda: (parts, write_back(output, staged))

    def _reduce_scatter(self, output: Tensor, inputs: Sequence[Tensor], op: Any) -> Started:
        staged, datatype, operation, average = self._reducible(output, op)
        self._check_parts(inputs, output)
        parts = Parts(inputs, staged.dtype)
        request = self.comm.Ireduce_scatter(
            message(parts.flat, datatype), message(staged, datatype), parts.counts, operation
        )
        return request, lambda: (parts, write_back(output, average(staged)))

    def _all_to_all(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Started:
        self._check_parts(inputs, outputs[self.rank()])
        self._check_parts(outputs, inputs[self.rank()])
        sent, received = Parts(inputs), Parts(outputs)
        return self.comm.Ialltoallv(sent.message, received.message), lambda: (sent, received.write_back())

    def _check_parts(self, parts: Sequence[Tensor], own: Tensor) -> None:
        """Raise unless there is one part for each rank, all have the dtype of `own`, and this rank's has its size."""
        if len(parts) != self.size():
            raise ValueError(f"expected a tensor for each of {self.size()} ranks, got {len(parts)}")
        for part in parts:
            _check(part.dtype == own.dtype, f"tensors of one dtype, {own.dtype}", part)
        mine = parts[self.rank()]
        _check(mine.numel() == own.numel(), f"{own.numel()} elements for rank {self.rank()}", mine)

    def _reducible(self, tensor: Tensor, op: Any) -> tuple[Tensor, MPI.Datatype, MPI.Op, Callable[[Tensor], Tensor]]:
        """Return the staged tensor, its MPI datatype, the operation, and a function that divides for an average."""
        dtype, datatype, operation, averages = reduction(int(op.op), tensor.dtype)
        return stage(tensor, dtype), datatype, operation, self._divide if averages else _identity

    def _divide(self, total: Tensor) -> Tensor:
        return total.div_(self.communicator.size)


def _check(right: bool, expected: str, tensor: Tensor) -> None:
    if not right:
        raise ValueError(f"expected {expected}, got a tensor of shape {tuple(tensor.shape)} and {tensor.dtype}")


def _identity(total: Tensor) -> Tensor:
    return total


register_group_type(MpiProcessGroup, lambda group: group.communicator)
