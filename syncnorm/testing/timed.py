"""A communicator that measures how long its collectives take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..communicators import ProcessGroupLike
from ..communicators.label import Label
from .counting import CountingCommunicator

__all__ = ["TimedCommunicator"]


class TimedCommunicator(CountingCommunicator):
    """A CountingCommunicator that also times its all-reduces. The wait for the slowest rank is part of their time.

    On a GPU the times are those of CUDA events. Nothing waits for the device until `seconds` is called. A group that
    `split` returns is counted and not timed.

    Args:
        process_group: whose rank, size and collectives it has, as in `syncnorm.communicator`.
    """

    def __init__(self, process_group: ProcessGroupLike = None):
        super().__init__(process_group)
        self._spans: list[tuple[Any, Any]] = []  # start and end of each call: seconds, or CUDA events

    def all_reduce(self, tensor: Tensor, label: Label | None = None) -> Tensor:
        """Note, time and pass on."""
        stop = self.start("all_reduce", tensor)
        result = self._all_reduce(tensor, label)
        stop()
        return result

    def start(self, name: str, tensor: Tensor) -> Callable[[], None]:
        """Note a collective on `tensor` that the caller issues itself, and start to time it.

        A communication hook of DistributedDataParallel can time its all-reduces by it.

        Returns:
            A function without arguments that stops the time. Call it when the collective has completed.
        """
        self._record(name, tensor)
        begin = _now(tensor)

        def stop() -> None:
            self._spans.append((begin, _now(tensor)))

        return stop

    def seconds(self) -> float:
        """Return the time of all that was timed. Waits for the device if that is a GPU."""
        return sum((_seconds_between(begin, end) for begin, end in self._spans), 0.0)

    def clear(self) -> None:
        """Forget all calls and times so far."""
        self.calls.clear()
        self._spans.clear()


def _now(tensor: Tensor) -> Any:
    """Return the time in seconds, or an event that the tensor's CUDA device records when it comes to it."""
    if not tensor.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(tensor.device))
    return event


def _seconds_between(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
