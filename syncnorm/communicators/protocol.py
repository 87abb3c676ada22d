"""The protocols of groups of ranks: `Collectives` is required of a `process_group`, `Communicator` adds `split`."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Collectives", "Communicator"]


@runtime_checkable
class Collectives(Protocol):
    """The members that an object needs to be a `process_group`.

    Every method below is collective: all ranks of the group must call it, in the same order and, for tensors, with the
    same shape and dtype. Tensors may have any dtype that the group's library supports, any strides, any number of
    elements (including zero), and any device. Results are on the same device.

    Any object with these members is accepted as a `process_group`, so a communicator can be wrapped (see
    `syncnorm.testing.CountingCommunicator`). Only `syncnorm.new_subgroups` also needs `Communicator.split`.
    """

    @property
    def rank(self) -> int:
        """The rank of this process in the group, from 0 to `size` - 1."""
        ...

    @property
    def size(self) -> int:
        """The number of ranks in the group."""
        ...

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks in place and return it. The result is bitwise identical on all ranks."""
        ...

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Overwrite `tensor` with that of rank `root` and return it."""
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
    """Make `isinstance` ignore `split`, because objects without it were accepted before it was added."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Collectives) if cls is Communicator else super().__instancecheck__(instance)


@runtime_checkable
class Communicator(Collectives, Protocol, metaclass=_WithoutSplit):
    """A group of ranks that exchange tensors and can be divided.

    It has the members of `Collectives`, and `split`. Every method is collective, as described there.

    `isinstance(obj, Communicator)` does not check for `split`, which only `syncnorm.new_subgroups` calls. A subclass of
    `Communicator` that does not define it cannot be divided.
    """

    def split(self, block: int) -> Communicator:
        """Return the group of the ranks that pass the same `block`, in the order of their ranks here."""
        raise TypeError(f"expected a communicator that defines split(block), got {self!r}: add the method")
