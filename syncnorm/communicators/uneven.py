"""A group of ranks of which some may run out of batches. These answer the collectives of the others.

A rank that has no batches left cannot know which collective the others issue next, or whether there is one. So the
ranks that have some announce each collective: all ranks of the group sum a header of 9 float64 on the CPU. It
counts the ranks that take part, and says what they are in. A rank without batches adds a header of zeros, reads the
sum, and takes part with zeros: no values, no gradient. The loop ends when no rank has announced anything.

The announced ranks compare their headers too. If they are in different calls, all ranks raise, those without batches
included.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import DesyncError, printable
from . import Communicator, uncounted
from .compiled import register
from .label import NO_BATCHES, Label, report
from .process_group import ProcessGroupCommunicator
from .sharing import has_cpu_backend, timeout_of

__all__ = ["UnevenGroup"]

ISSUES_COLLECTIVES = True  # lets `syncnorm.job.desync` recognize these functions

ALL_REDUCE, ALL_GATHER = 1, 2
NUMBERS = 2**20  # of which a header's check is one, so that its square is exact


class _Header(NamedTuple):
    """What one rank announces, or the sum over the ranks."""

    ranks: float = 0  # that announce
    check: float = 0  # of the whole call: equal on two ranks if they are in the same one
    check_squared: float = 0
    number: float = 0  # of the stamp
    kind: float = 0
    rows: float = 0  # of the tensor, of any shape (rows, length)
    length: float = 0
    on_accelerator: float = 0
    block: float = 0  # of syncnorm.join, counted in each group


class UnevenGroup:
    """The ranks of a group of which some may run out of batches, for the collectives of norms.

    The collectives go to a group of their own, so that they cannot be mixed up with those of the program: a rank
    answers them in another thread. Each is preceded by the sum of a header.

    Args:
        group: the ranks. All of them must construct this at the same time: it divides the group the first time.
        throws: raise as soon as a rank has no batches left.

    Raises:
        RuntimeError: the group is in use by another one, or its MPI does not support threads.
        TypeError: the group has no `split`.
    """

    takes_labels = True
    not_in_graph = (
        "expected a model that is not compiled in syncnorm.join, got one in torch.compile: how many ranks "
        "have batches is only known when it runs"
    )

    def __init__(self, group: Communicator, *, throws: bool = False):
        self.rank, self.size, self.throws = group.rank, group.size, throws
        own = _of_its_own(group)
        own.blocks += 1
        self.block = own.blocks
        self._own, self._group, self._announced_to = own, own.group, own.for_cpu
        own.is_used = True
        self.answered = 0  # collectives of other ranks
        register(self)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group of torch.distributed, if it is one."""
        return getattr(uncounted(self._group), "group", None)

    def all_reduce(self, tensor: Tensor, label: Label | None = None) -> Tensor:
        """Sum `tensor` over the ranks in place. Those without batches add zeros, with the stamp of the label."""
        self._announce(ALL_REDUCE, tensor, label)
        return self._group.all_reduce(tensor)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, in rank order. Those of ranks without batches are a report of that."""
        self._announce(ALL_GATHER, tensor, None)
        return self._group.all_gather(tensor)

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Overwrite `tensor` with that of `root`. Not announced: all ranks must call it."""
        return self._group.broadcast(tensor, root)

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return the objects of all ranks. Not announced: all ranks must call it."""
        return self._announced_to.all_gather_object(obj)

    def barrier(self) -> None:
        """Wait for all ranks. Not announced: all ranks must call it."""
        self._announced_to.barrier()

    def answer(self, device: torch.device) -> None:
        """Take part in the collectives of the ranks that have batches, until none has any.

        Args:
            device: of this rank, for those of an accelerator.

        Raises:
            DesyncError: those ranks are in different calls, or one of them does not come.
        """
        while (announced := self._exchange(_Header(), NO_BATCHES)) is not None:
            self.answered += 1
            rows, length = int(announced.rows), int(announced.length)
            where = device if announced.on_accelerator else torch.device("cpu")
            if announced.kind == ALL_GATHER:
                message = torch.frombuffer(bytearray(report(NO_BATCHES, length)), dtype=torch.uint8)
                self._group.all_gather(message.to(where))
                continue
            message = torch.zeros(rows, length, dtype=torch.float64, device=where)
            message[:, -2], message[:, -1] = announced.number, announced.number**2
            self._group.all_reduce(message)

    def close(self) -> None:
        """Leave the group to the next block."""
        self._own.is_used = False

    def _announce(self, kind: int, tensor: Tensor, label: Label | None) -> None:
        number = 0 if label is None else label.number
        length = tensor.shape[-1] if tensor.dim() else 1
        what = kind, tuple(tensor.shape), tensor.dtype, tensor.device.type, number, self.block
        check = zlib.crc32(repr(what).encode()) % NUMBERS
        header = _Header(
            *(1, check, check**2, number, kind, tensor.numel() // max(length, 1), length, not tensor.is_cpu, self.block)
        )
        name = "all_reduce" if kind == ALL_REDUCE else "all_gather"
        self._exchange(header, f"{name} of {tuple(tensor.shape)}" + (f" of {label}" if label else ""))

    def _exchange(self, own: _Header, where: str) -> _Header | None:
        """Return what is announced. None: nothing, on no rank.

        Raises:
            DesyncError: on all ranks, if they announce different things.
        """
        total = self._announced_to.all_reduce(torch.tensor(own, dtype=torch.float64, device="cpu")).tolist()
        ranks, check, check_squared = map(int, total[:3])
        if ranks == 0:
            return None
        if self.throws and ranks < self.size:
            raise RuntimeError(
                f"expected as many batches on all ranks with throw_on_early_termination=True, got none on "
                f"{self.size - ranks} of {self.size} ranks"
            )
        if not _agree(ranks, check, check_squared):
            places = self._announced_to.all_gather_object(where)
            raise DesyncError(
                "expected all ranks that have batches to be in the same call of the same layer, got\n"
                + "\n".join(f"  rank {rank}: {printable(place)}" for rank, place in enumerate(places))
            )
        announced = _Header(*(value / ranks for value in total))
        if announced.block != self.block:
            raise DesyncError(
                f"expected all ranks to be in the same block of syncnorm.join, got rank {self.rank} in block "
                f"{self.block} and another one in block {announced.block:g}: a rank has left a block by an exception"
            )
        return announced

    def __repr__(self) -> str:
        return f"UnevenGroup({self._group!r})"


@dataclass
class _Own:
    """Groups of the same ranks as a group, for the collectives of its norms in syncnorm.join.

    Attributes:
        group: for what is announced.
        for_cpu: for the headers.
        blocks: how many there have been.
        is_used: whether a block has not ended.
    """

    group: Communicator
    for_cpu: Communicator
    blocks: int = 0
    is_used: bool = False


def _of_its_own(group: Communicator) -> _Own:
    """Return the groups of a group. They are made once."""
    own: _Own | None = getattr(group, "_for_joins", None)
    if own is None:
        if not callable(getattr(group, "split", None)):
            raise TypeError(f"expected a communicator that defines split(block) in syncnorm.join, got {group!r}")
        if not getattr(uncounted(group), "takes_threads", True):
            raise RuntimeError("expected an MPI that supports threads (MPI_THREAD_MULTIPLE) in syncnorm.join, got none")
        made = group.split(0)
        own = group._for_joins = _Own(made, _for_cpu(made))  # type: ignore[attr-defined]
    if own.is_used:
        raise RuntimeError(
            "expected one syncnorm.join at a time for the layers of a process group, got a second one: pass the models "
            "together, as in syncnorm.join(nn.ModuleList([generator, discriminator]))"
        )
    return own


def _agree(ranks: int, total: int, total_of_squares: int) -> bool:
    """Return whether the values of so many ranks are equal, by their sum and the sum of their squares."""
    return ranks * total_of_squares == total**2  # of integers, since the products have no float64


def _for_cpu(group: Communicator) -> Communicator:
    """Return a group of the same ranks that sums CPU tensors. One of NCCL alone does not."""
    inner = uncounted(group)
    if not isinstance(inner, ProcessGroupCommunicator) or inner.group is None or has_cpu_backend(inner.group):
        return inner
    ranks, timeout = dist.get_process_group_ranks(inner.group), timedelta(seconds=timeout_of(inner.group))
    made = dist.new_group(ranks, backend="gloo", timeout=timeout, use_local_synchronization=True)
    return ProcessGroupCommunicator(made)
