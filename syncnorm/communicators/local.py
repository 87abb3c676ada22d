"""A group of one: this process alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["LocalCommunicator"]

ISSUES_COLLECTIVES = True  # lets `syncnorm.job.desync` recognize these functions


class LocalCommunicator:
    """The communicator of one process. Every collective is the identity and stays within the process."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return `tensor`, which is the sum over one rank."""
        return tensor

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Return `tensor`. The only valid root is rank 0."""
        if root != 0:
            raise ValueError(f"expected a root rank below the group's size 1, got {root}")
        return tensor

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return a list of one copy of `tensor`."""
        return [tensor.detach().clone()]

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return a list of one element, `obj`."""
        return [obj]

    def barrier(self) -> None:
        """Return immediately."""

    def split(self, block: int) -> LocalCommunicator:
        """Return this group, whose only rank is the only block."""
        return self

    def __repr__(self) -> str:
        return "LocalCommunicator()"
