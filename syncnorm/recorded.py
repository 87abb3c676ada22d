"""The norms in a graph of torch.compile: one call, which the compiler does not look into while it traces a model.

Tracing each line of Python of a norm would take about a second. So the graph gets a call of the same function that runs
without a compiler. AOTAutograd then runs it with tensors without values, and records torch's operations, those of
backward too. A graph holds no group of ranks: it holds the handle of one (`communicators.compiled`).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import transforms
from .all_reduce import recording_error
from .communicators import Communicator, LocalCommunicator, ProcessGroupLike, communicator, compiled
from .communicators.order import keep_order
from .exchange import NO_EXCHANGE, Exchange, note_compilation

__all__ = ["ALONE", "RecordedExchange", "handle_of", "in_graph"]

ALONE = 0  # the handle of no group
_calls: list[Callable[..., Tensor]] = []


class RecordedExchange(Exchange):
    """The collectives of one call in a graph, whose messages have the number 0."""

    __slots__ = ("handle",)
    in_graph = True

    def __init__(self, handle: int | None):
        if handle is None:
            raise RuntimeError(
                "expected a process group that takes attributes and weak references in torch.compile, got one without"
            )
        group = compiled.of_handle(handle)
        if (reason := getattr(group, "not_in_graph", None)) is not None:
            raise RuntimeError(reason)
        if transforms.is_exporting():
            raise recording_error(group.size)
        note_compilation()
        super().__init__(weakref.proxy(group))  # the graph does not keep the group alive
        self.handle = handle

    def all_reduce(self, tensor: Tensor, *, backward: bool) -> Tensor:
        """Return the sum of the message over the ranks, as a new tensor."""
        return compiled.all_reduce(tensor, self.handle)


def in_graph(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return what calls a function of this package in a graph.

    It takes the function's arguments, with `handle` in the place of `process_group`.
    """

    @functools.wraps(function)
    def call(*arguments: Any, handle: int | None, **options: Any) -> Tensor:
        exchange = NO_EXCHANGE if handle == ALONE else RecordedExchange(handle)
        with transforms.of_compiler():
            return function(*arguments, process_group=exchange, **options)

    _calls.append(call)
    return call


def handle_of(process_group: ProcessGroupLike) -> int | None:
    """Return the handle of a group, or ALONE, while torch.compile traces. None: it has none, which the call refuses."""
    if process_group is NO_EXCHANGE:  # type: ignore[comparison-overlap]  # as a module passes it
        return _alone()
    handle = _prepare()
    return handle if process_group is None else _handle(communicator(process_group))


def _handle(group: Communicator) -> int | None:
    return ALONE if isinstance(group, LocalCommunicator) else compiled.handle_of(group)


def _prepare() -> int | None:
    """Return the handle of the default group. torch.compile calls this, and does not trace it."""
    _allow()
    return _handle(communicator())


def _alone() -> int:
    """Return ALONE. torch.compile calls this, and does not trace it."""
    _allow()
    return ALONE


@functools.cache
def _allow() -> None:
    """Keep the compiler from looking into the calls. This comes before each of them."""
    keep_order()
    for call in _calls:
        torch.compiler.allow_in_graph(call)  # type: ignore[no-untyped-call]


# What torch.compiler.assume_constant_result does, which imports the compiler.
for _function in (_prepare, _alone):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]
