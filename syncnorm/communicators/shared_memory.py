"""All-reduces of CPU tensors through memory that the ranks of one host share.

`syncnorm/kernels/cpu/shared_memory.h` has the algorithm. This file calls it, and decides what happens when a rank does
not come: it was killed, it has left the group, or it stays away until the timeout.

If the ranks are on several hosts, each host sums its ranks' values in memory. The first rank of each host, its leader,
exchanges the sum with the other leaders, and gives its host the sum of all.

Values are summed in the order of the ranks of a host, and then of the hosts. So a sum has the same bits on every rank,
every time.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import printable
from ..kernels.cpu.library import check_layouts, load
from .between_hosts import Leaders
from .health import Health
from .host import has_ended
from .label import Label
from .segment import MOST_BYTES, SLOT, Segment

__all__ = ["OtherRanksError", "Peer", "SharedMemory", "bytes_of_segment"]

PATIENCE = 0.05  # seconds between two looks at whether the missing ranks still run
VALUES = {
    **{torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.int8: 4, torch.int16: 5},
    **{torch.int32: 6, torch.int64: 7, torch.uint8: 8},
}
UNLABELLED = Label(-1, 0, False, b"")
DONE, WAITING, DIFFERENT, FAILED = range(4)

_MESSAGE = "5q160s"  # number, call, backward, bytes, dtype, layer
_LAYOUTS = {"SharedArguments": "PqqqqP" + _MESSAGE, "Progress": "qq" + _MESSAGE, "Slot": f"{SLOT}s"}
_pack = struct.Struct(_LAYOUTS["SharedArguments"]).pack
_progress = struct.Struct(_LAYOUTS["Progress"])


def _function(name: str, *further: Any, returns: Any = ctypes.c_int64) -> Callable[..., Any]:
    function = getattr(load(), f"syncnorm_shared_{name}")
    function.argtypes, function.restype = [ctypes.c_char_p, *further], returns
    return function  # type: ignore[no-any-return]


check_layouts(_LAYOUTS)
_all_reduce, _collect, _lead, _take = map(_function, ("all_reduce", "collect", "lead", "take"))
_post = _function("post", returns=None)
_publish = _function("publish", ctypes.c_int64, returns=None)
_leave = _function("leave", returns=None)
_get_result = _function("result", returns=ctypes.c_void_p)
_get_progress = _function("progress", ctypes.c_int64, ctypes.c_char_p, returns=None)


def bytes_of_segment(ranks: int) -> int:
    """Return the size of the memory that so many ranks share."""
    size = load().syncnorm_shared_bytes
    size.argtypes, size.restype = [ctypes.c_int64], ctypes.c_int64
    return int(size(ranks))


class OtherRanksError(RuntimeError):
    """An all-reduce failed because of other ranks. The message says which ones, and where they were last."""


class Peer(NamedTuple):
    """A rank of this host."""

    rank: int  # in the group
    process: int
    start: str  # of the process, as `host.start_of` returns it


class SharedMemory:
    """The ranks of a process group that sum through memory.

    Args:
        segment: the memory, which all ranks of this host have mapped.
        peers: the ranks of this host, in their order, with this one.
        rank: of this process in the group.
        leaders: the first ranks of all hosts. None if there is one host.
        timeout: seconds after which an all-reduce raises if other ranks have not joined it.
        crowded: whether this host has more ranks than cores.
    """

    def __init__(
        self, segment: Segment, peers: Sequence[Peer], rank: int, leaders: Leaders | None, timeout: float, crowded: bool
    ):
        self.peers, self.leaders, self.timeout, self.health = peers, leaders, timeout, Health()
        self.place = [peer.rank for peer in peers].index(rank)  # of this rank among them
        self._segment, self._crowded = segment, crowded
        self._own = self._of(self.place)
        # Called when the group is destroyed, and when Python exits. It must not refer to self.
        self.leave = weakref.finalize(self, _leave_segment, segment, self._without_message(self.place), os.getpid())
        self.leave.atexit = False  # too late: see `sharing`

    def all_reduce(self, tensor: Tensor, label: Label | None = None) -> bool:
        """Sum a dense CPU tensor over the ranks in place.

        Returns:
            whether it is summed. If not, the tensor has more than 64 KB or a dtype that is not summed in memory. The
            ranks have then compared what they sum, and it remains to be summed by the backend of the group.

        Raises:
            OtherRanksError: the ranks' labels, sizes or dtypes differ, a rank has ended or left the group, or the
                timeout has expired.
            DesyncError: an earlier call has failed.
        """
        if self.health.failure is not None:
            self.health.check()
        size, dtype = tensor.nbytes, VALUES.get(tensor.dtype)
        fits = dtype is not None and size <= MOST_BYTES
        number, call, backward, layer = UNLABELLED if label is None else label
        arguments = _pack(
            *(*self._own, tensor.data_ptr() if fits else 0, number, call, backward, size),
            *(_number_of(tensor.dtype) if dtype is None else dtype, layer),
        )
        if self.leaders is None:
            outcome = _all_reduce(arguments)
            if outcome == WAITING:
                outcome = self._wait(_collect, arguments)
        else:
            outcome = self._all_reduce_over_hosts(self.leaders, tensor, fits, arguments)
        if outcome:  # all ranks find that, so they remain synchronized
            raise OtherRanksError("expected all ranks to sum the same message, got\n" + self._messages())
        return fits

    def _all_reduce_over_hosts(self, leaders: Leaders, tensor: Tensor, fits: bool, arguments: bytes) -> int:
        _post(arguments)
        if self.place == 0:
            outcome = FAILED
            try:
                agrees = self._wait(_lead, arguments) == DONE
                agrees &= leaders.all_reduce(_get_result(arguments), tensor.nbytes * fits, tensor.dtype, agrees)
                outcome = DONE if agrees else DIFFERENT
            except RuntimeError as error:
                self.health.fail(f"all_reduce: {error}")
                raise OtherRanksError(str(error)) from error
            finally:
                _publish(arguments, outcome)
                if outcome == FAILED:
                    leaders.give_up()
        outcome = self._wait(_take, arguments)
        if outcome == FAILED:
            self.health.fail(what := f"rank {self.peers[0].rank} did not get the sums of the other hosts")
            raise OtherRanksError(what)
        return outcome

    def _wait(self, step: Callable[[bytes], int], arguments: bytes) -> int:
        """Repeat a step until the other ranks have come, and return its outcome."""
        deadline, problem = time.monotonic() + self.timeout, ""
        try:
            while (outcome := step(arguments)) == WAITING:
                if problem:  # found before this step, in which the ranks may have come
                    raise OtherRanksError(problem)
                problem = self._problem(time.monotonic() > deadline)
        except BaseException as error:  # KeyboardInterrupt, too
            self.health.fail(f"all_reduce: {str(error) or type(error).__name__}")
            raise
        return outcome

    def _problem(self, is_late: bool) -> str:
        """Return why to wait no longer, or ""."""
        progress = [self._progress_of(place) for place in range(len(self.peers))]
        calls = progress[self.place].calls
        ranks = list(zip(self.peers, progress, strict=True))
        missing = [(peer, at) for peer, at in ranks if (at.calls - calls) % 2**32 >= 2**31]
        for peer, at in missing or ranks[: self.leaders is not None]:  # the leader, when its host is complete
            if at.has_left:
                return f"rank {peer.rank} has left the group; {at}"
            if has_ended(peer.process, peer.start):
                return f"rank {peer.rank} has ended (process {peer.process}); {at}"
        if not is_late:
            return ""
        where = "".join(f"\n  rank {peer.rank} did not come; {at}" for peer, at in missing)
        return f"waited {self.timeout:g} s for its peers until the timeout expired" + (where or " on other hosts")

    def _messages(self) -> str:
        """Return what each rank of this host has sent in this call. Some may already be in the next one."""
        call = self._progress_of(self.place).calls
        messages = [self._progress_of(place, call).message for place in range(len(self.peers))]
        return "\n".join(f"  rank {peer.rank}: {sent}" for peer, sent in zip(self.peers, messages, strict=True))

    def _progress_of(self, place: int, call: int = 0) -> _Progress:
        """Return how far a rank is, with its message of a call (0: the last one)."""
        progress = ctypes.create_string_buffer(_progress.size)
        _get_progress(self._without_message(place), call, progress)
        calls, has_left, *message = _progress.unpack(progress)
        return _Progress(calls, bool(has_left), _Message(*message))

    def _without_message(self, place: int) -> bytes:
        return _pack(*self._of(place), 0, *UNLABELLED[:3], 0, 0, b"")

    def _of(self, place: int) -> tuple[int, int, int, bool, int]:
        return self._segment.address, place, len(self.peers), self._crowded, int(1e9 * PATIENCE)


class _Message(NamedTuple):
    """What a rank has sent."""

    number: int
    call: int
    backward: int
    size: int
    dtype: int
    layer: bytes

    def __str__(self) -> str:
        dtype = next((dtype for dtype, value in VALUES.items() if value == self.dtype), None)
        name = str(dtype).removeprefix("torch.")
        values = f"{self.size} bytes" if dtype is None else f"{self.size // dtype.itemsize} {name}"
        label = Label(self.number, self.call, bool(self.backward), self.layer.rstrip(b"\0"))
        return f"{values} of {printable(str(label))}" if label.layer else f"{values}, outside of a layer"


class _Progress(NamedTuple):
    """How far a rank is."""

    calls: int
    has_left: bool
    message: _Message

    def __str__(self) -> str:
        return f"its last all_reduce was of {self.message}" if self.calls else "it has not called all_reduce yet"


def _leave_segment(segment: Segment, arguments: bytes, process: int) -> None:
    """Tell the others that this rank will not call again. The argument keeps the segment mapped until then."""
    if os.getpid() == process:  # not a forked child
        _leave(arguments)


def _number_of(dtype: torch.dtype) -> int:
    """Return a number that tells this dtype from others, summed in memory or not."""
    return len(VALUES) + zlib.crc32(str(dtype).encode())
