"""What the package needs of a group of ranks: `Collectives`; what its own groups have: the `Communicator` protocol."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Collectives", "Communicator"]


@runtime_checkable
class Collectives(Protocol):
    """The members that an object needs to be a `process_group`.

    Every method below is collective: all ranks of the group call it, in the same order and, for tensors, with
    the same shape and dtype. Tensors may have any dtype that the group's library can carry, any strides, any
    number of elements (zero included), and live on any device; results are written on that device.

    Any object with these members is accepted wherever a `process_group` is, so a communicator can be wrapped
    (see `syncnorm.testing.CountingCommunicator`). Only `syncnorm.new_subgroups` needs `Communicator.split` too.
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


class _WithoutSplit(type(Protocol)):  # type: ignore[misc]
    """Let `isinstance` take an object without `split`: groups of ranks were accepted before there was one."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Collectives) if cls is Communicator else super().__instancecheck__(instance)


@runtime_checkable
class Communicator(Collectives, Protocol, metaclass=_WithoutSplit):
    """A group of ranks that exchange tensors and can be divided.

    Its members are those of `Collectives`, and `split`. Every method is collective, as described there.

    `isinstance(obj, Communicator)` does not look for `split`, which only `syncnorm.new_subgroups` calls. A class that
    inherits from `Communicator` and does not define it cannot be divided.
    """

    def split(self, block: int) -> Communicator:
        """Return the ranks that call this with the same `block`, in the order of their ranks here."""
        raise TypeError(f"expected a communicator that defines split(block), got {self!r}: add the method")
