"""Tell the blocks of `syncnorm.testing.count_collectives` of each collective that this process issues.

Each collective is reported once, where it leaves this package: to MPI, or to memory that ranks share. Those of
torch.distributed, whoever issues them, are reported by `syncnorm.testing.dispatched`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from .label import Label

__all__ = ["CollectiveCall", "listeners", "of_layer", "report_call", "unreported"]


class CollectiveCall(NamedTuple):
    """A collective that this process has issued.

    Attributes:
        name: that of the function of torch.distributed, such as "all_reduce". It is "all_gather_into_tensor" and
            "reduce_scatter_tensor" for their newer names `all_gather_single` and `reduce_scatter_single`, too.
        nbytes: the size of this rank's input, or of what it receives from a scatter. 0 for barriers.
        world_size: the number of ranks in the group.
        layer: the name of the layer of this package that issued it, such as "1.bn of Net (SyncBatchNorm no. 2)". ""
            if the caller was no such layer, or one that torch.compile has compiled.
    """

    name: str
    nbytes: int
    world_size: int
    layer: str = ""


class _Thread(threading.local):
    """What this thread is in: a message of a layer, or a collective that is not reported."""

    layer = ""
    is_unreported = False


listeners: list[Callable[[CollectiveCall], None]] = []  # of all threads. Empty: nobody counts, and nothing is reported
_thread = _Thread()


def report_call(name: str, tensors: Iterable[Tensor], world_size: int) -> None:
    """Tell the listeners of a collective of this thread. Call this if there are any."""
    if _thread.is_unreported:
        return
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    call = CollectiveCall(name, nbytes, world_size, _thread.layer)
    for listen in tuple(listeners):
        listen(call)


@contextlib.contextmanager
def of_layer(label: Label) -> Iterator[None]:
    """Report the collectives of this thread with the layer of a label."""
    _thread.layer = label.layer.decode(errors="ignore")
    try:
        yield
    finally:
        _thread.layer = ""


@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """Do not report the collectives of this thread: they are checks, or part of one that is reported."""
    before, _thread.is_unreported = _thread.is_unreported, True
    try:
        yield
    finally:
        _thread.is_unreported = before
