"""What a norm computes in a segment of `torch.utils.checkpoint`, kept for when backward runs the segment again.

A recomputation calls the norms of a segment again, in the same order. Each then takes the moments of its first call.
So it issues no collective, does not update the running statistics again, and gives the same bits.

torch tells nobody that a segment is running. Its non-reentrant variant pushes hooks for saved tensors, of which one
refers to the segment. The reentrant variant runs in methods of an autograd Function, which are on the Python stack, in
a first pass without gradients or in a backward pass. A checkpoint that is not torch's own is not recognized.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import _C
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import CheckpointFunction

from . import transforms
from .exchange import Exchange
from .moments import Moments

__all__ = ["Call", "Segments", "enclosing", "hide_from_policies", "recomputes"]

FIRST_PASS = "_checkpoint_hook.__init__.<locals>.pack_hook"  # names of torch's hooks, in which `frame` is the segment
RECOMPUTATION = "_recomputation_hook.__init__.<locals>.pack_hook"
SELECTIVE = "_CachingTorchDispatchMode", "_CachedTorchDispatchMode"  # of policies that keep the results of operations
ATTRIBUTE = "_syncnorm_calls"

_FORWARD, _BACKWARD = CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__
_push, _pop = _C._autograd._push_saved_tensors_default_hooks, _C._autograd._pop_saved_tensors_default_hooks
_grad_is_enabled, _graph_task = torch.is_grad_enabled, _C._current_graph_task_id
_top = _C._autograd._top_saved_tensors_default_hooks


class Call(NamedTuple):
    """A call of a norm in training, as a segment keeps it."""

    moments: Moments  # of the whole batch
    exchange: Exchange


class _Segment:
    """The calls in one segment, kept with what torch keeps of it.

    Attributes:
        calls: of the first pass, in their order.
        recomputation: what tells the latest one from others.
        position: of the next call in it.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.recomputation: object = None
        self.position = 0

    @classmethod
    def of(cls, owner: Any) -> _Segment:
        """Return the segment of an object that torch keeps for it."""
        segment: _Segment | None = getattr(owner, ATTRIBUTE, None)
        if segment is None:
            segment = cls()
            setattr(owner, ATTRIBUTE, segment)
        return segment

    def next(self, recomputation: object) -> Call:
        """Return the first pass of the call that a recomputation has reached."""
        if recomputation != self.recomputation:
            self.recomputation, self.position = recomputation, 0
        if self.position == len(self.calls):
            raise RuntimeError(
                "expected a recomputation with the calls of its first pass, got one with another call of a norm: the "
                "function that is passed to torch.utils.checkpoint must do the same both times"
            )
        self.position += 1
        return self.calls[self.position - 1]


class Segments(NamedTuple):
    """The segments that a call of a norm is in.

    Attributes:
        running: those that are in their first pass.
        recomputed: the one that is in a recomputation, around those, and what tells this recomputation from others.
    """

    running: list[_Segment]
    recomputed: tuple[_Segment, object] | None

    def recall(self) -> Call | None:
        """Return the first pass of this call. None: this is the first pass."""
        if self.recomputed is None:
            return None
        call = self.recomputed[0].next(self.recomputed[1])
        self.keep(call)
        return _copied(call)

    def keep(self, call: Call) -> None:
        """Keep this call for the recomputations of the segments that are in their first pass."""
        for segment in self.running:
            segment.calls.append(_copied(call))


def enclosing() -> Segments | None:
    """Return the segments that the program is in. None: it is in none, or in one that is traced or transformed."""
    if transforms.compiling() or (_top(True) is None and _grad_is_enabled() and _graph_task() == -1):
        return None
    if transforms.active() or is_compiling():
        return None
    running: list[_Segment] = []
    recomputed: tuple[_Segment, object] | None = None
    for hook in _hooks():
        name = getattr(hook, "__qualname__", "")
        if name == FIRST_PASS:
            running.append(_Segment.of(_variable(hook, "frame")))
        elif name == RECOMPUTATION:
            recomputed = _Segment.of(_variable(hook, "target_frame_ref")()), hook
            break
    if not _grad_is_enabled() or _graph_task() != -1:
        frame = sys._getframe()
        while frame is not None:
            if frame.f_code is _FORWARD:
                running.append(_Segment.of(frame.f_locals["ctx"]))
            elif frame.f_code is _BACKWARD:
                recomputed = recomputed or (_Segment.of(frame.f_locals["ctx"]), _graph_task())
                break
            frame = frame.f_back  # type: ignore[assignment]
    return Segments(running, recomputed) if running or recomputed else None


def hide_from_policies() -> contextlib.ExitStack:
    """Let no policy see operations until this is closed. It would expect to see the same ones in a recomputation."""
    stack = contextlib.ExitStack()
    if any(type(mode).__name__ in SELECTIVE for mode in _get_current_dispatch_mode_stack()):
        stack.enter_context(_disable_current_modes())
    return stack


def recomputes() -> bool:
    """Return whether the program is in the recomputation of a segment."""
    segments = enclosing()
    return segments is not None and segments.recomputed is not None


def _hooks() -> Iterator[Callable[..., Any]]:
    """Yield the hooks that pack saved tensors, the innermost first."""
    popped = []
    try:
        while (top := _top(True)) is not None:
            _pop()
            popped.append(top)
            yield top[0]
    finally:
        for hooks in reversed(popped):
            _push(*hooks)


def _variable(function: Any, name: str) -> Any:
    """Return what a nested function knows by a name."""
    function = inspect.unwrap(function)
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _copied(call: Call) -> Call:
    """Return the call with moments of its own: normalizing may overwrite them."""
    return call._replace(moments=call.moments.clone())
