"""A communicator that counts the collectives of another one."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..communicators import Communicator, ProcessGroupLike, communicator, uncounted
from ..communicators.compiled import register
from ..communicators.label import Label

__all__ = ["Call", "CountingCommunicator"]


class Call(NamedTuple):
    """One collective: its name and the size in bytes of this rank's tensor (0 for objects and barriers)."""

    name: str
    nbytes: int


class CountingCommunicator:
    """A communicator that records every collective in `calls` and forwards it to another communicator.

    `split` returns another CountingCommunicator, with its own `calls`.

    Args:
        process_group: the group to forward to, as in `syncnorm.communicator`.
    """

    def __init__(self, process_group: ProcessGroupLike = None):
        self.communicator = communicator(process_group)
        self.calls: list[Call] = []
        register(self)

    @property
    def uncounted(self) -> Communicator:
        """The wrapped communicator, for collectives that a layer issues only once and not at each step."""
        return uncounted(self.communicator)

    @property
    def rank(self) -> int:
        """The rank of the wrapped communicator."""
        return self.communicator.rank

    @property
    def size(self) -> int:
        """The size of the wrapped communicator."""
        return self.communicator.size

    @property
    def takes_labels(self) -> bool:
        """Whether the wrapped communicator takes labels. If not, they are dropped."""
        return getattr(self.communicator, "takes_labels", False)

    def all_reduce(self, tensor: Tensor, label: Label | None = None) -> Tensor:
        """Record and forward."""
        self._record("all_reduce", tensor)
        return self._all_reduce(tensor, label)

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Record and forward."""
        self._record("broadcast", tensor)
        return self.communicator.broadcast(tensor, root)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Record and forward."""
        self._record("all_gather", tensor)
        return self.communicator.all_gather(tensor)

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Record and forward."""
        self._record("all_gather_object")
        return self.communicator.all_gather_object(obj)

    def barrier(self) -> None:
        """Record and forward."""
        self._record("barrier")
        self.communicator.barrier()

    def split(self, block: int) -> CountingCommunicator:
        """Record and forward, and wrap the new group. Raises TypeError if the wrapped communicator has no `split`."""
        if not callable(getattr(self.communicator, "split", None)):
            raise TypeError(f"expected a communicator that defines split(block), got {self.communicator!r}: add it")
        self._record("split")
        return CountingCommunicator(self.communicator.split(block))

    def _all_reduce(self, tensor: Tensor, label: Label | None) -> Tensor:
        if label is not None and self.takes_labels:
            return self.communicator.all_reduce(tensor, label)  # type: ignore[call-arg]
        return self.communicator.all_reduce(tensor)

    def _record(self, name: str, tensor: Tensor | None = None) -> None:
        self.calls.append(Call(name, 0 if tensor is None else tensor.numel() * tensor.element_size()))
