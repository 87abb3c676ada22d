"""Count the collectives that a process issues, whoever issues them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, overload

from torch.library import Library

from ..communicators.listeners import CollectiveCall, listeners
from .dispatched import reporting

__all__ = ["CollectiveCalls", "count_collectives"]

_lock = threading.Lock()  # of entering and leaving a block
_kernels: list[Library] = []  # those of the outermost block


class CollectiveCalls(Sequence[CollectiveCall]):
    """The collectives of a block of `count_collectives`, in the order in which they were issued."""

    def __init__(self) -> None:
        self._calls: list[CollectiveCall] = []

    @property
    def nbytes(self) -> int:
        """The bytes of all of them."""
        return sum(call.nbytes for call in self._calls)

    def count(self, name: Any) -> int:
        """Return how many have this name, such as "all_reduce"."""
        return sum(call.name == name for call in self._calls)

    @overload
    def __getitem__(self, index: int) -> CollectiveCall: ...
    @overload
    def __getitem__(self, index: slice) -> list[CollectiveCall]: ...
    def __getitem__(self, index: int | slice) -> CollectiveCall | list[CollectiveCall]:
        return self._calls[index]

    def __len__(self) -> int:
        return len(self._calls)

    def __repr__(self) -> str:
        return f"CollectiveCalls({self._calls})"


@contextlib.contextmanager
def count_collectives() -> Iterator[CollectiveCalls]:
    """Record every collective that this process issues inside of the block. Issues none itself.

    It records those of all threads, in forward and in backward, on any group of ranks:

    - of this package's layers and communicators, over Gloo, NCCL, MPI or memory that the ranks of a host share, also
      in code that torch.compile has compiled.
    - of torch.distributed, whoever issues them: the program, DistributedDataParallel, functional collectives.

    A collective is recorded once, when it is issued, as the backend gets it. So a `dist.all_gather_object` is two
    `all_gather`. Blocks may be nested: the outer one records what the inner one does.

    Not recorded are the comparison of the ranks in the first two calls of a layer, the checks of `syncnorm.debug`,
    point-to-point calls, the creation of groups, and what a program calls in mpi4py itself. Neither is what a replayed
    CUDA graph issues, nor a process group or communicator that is written in Python and bypasses those above.

    Enter and leave the block while no other thread is in a collective.

    Yields:
        CollectiveCalls: a sequence of `CollectiveCall`, with `count(name)` and `nbytes`.

    Example:
        >>> with syncnorm.testing.count_collectives() as calls:
        ...     model(x).sum().backward()
        >>> assert calls.count("all_reduce") == 2
    """
    calls = CollectiveCalls()
    listen = calls._calls.append
    with _lock:
        if not listeners:
            _kernels.append(reporting())
        listeners.append(listen)
    try:
        yield calls
    finally:
        with _lock:
            listeners.remove(listen)
            if not listeners:
                _kernels.pop()._destroy()  # type: ignore[no-untyped-call]
