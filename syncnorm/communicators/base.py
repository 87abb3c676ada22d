"""What the package needs of a group of ranks: the `Communicator` protocol."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Communicator"]


@runtime_checkable
class Communicator(Protocol):
    """A group of ranks that exchange tensors.

    Every method below is collective: all ranks of the group call it, in the same order and, for tensors, with
    the same shape and dtype. Tensors may have any dtype that the group's library can carry, any strides, any
    number of elements (zero included), and live on any device; results are written on that device.

    Any object with these members is accepted wherever a `process_group` is, so a communicator can be wrapped
    (see `syncnorm.testing.CountingCommunicator`).
    """

    @property
    def rank(self) -> int:
        """This process in the group, from 0 to `size` - 1."""
        ...

    @property
    def size(self) -> int:
        """The number of ranks in the group."""
        ...

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over the ranks, in place, and return it: bit for bit the same everywhere."""
        ...

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Replace `tensor` by that of the rank `root`, in place, and return it."""
        ...

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, in rank order."""
        ...

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return the picklable objects of all ranks, in rank order."""
        ...

    def barrier(self) -> None:
        """Return when every rank of the group has called it."""
        ...
