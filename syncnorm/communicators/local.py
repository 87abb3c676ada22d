"""A group of one: this process alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["LocalCommunicator"]

ISSUES_COLLECTIVES = True  # what `syncnorm.job.desync` knows these functions by


class LocalCommunicator:
    """The communicator of one process. Every collective is the identity; none leaves the process."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return `tensor`: a sum over one rank."""
        return tensor

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Return `tensor`; the only root is rank 0."""
        if root != 0:
            raise ValueError(f"expected a root rank below the group's size 1, got {root}")
        return tensor

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return a copy of `tensor`, alone in a list."""
        return [tensor.detach().clone()]

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return `obj`, alone in a list."""
        return [obj]

    def barrier(self) -> None:
        """Return at once."""

    def split(self, block: int) -> LocalCommunicator:
        """Return this group: one rank is one block."""
        return self

    def __repr__(self) -> str:
        return "LocalCommunicator()"
