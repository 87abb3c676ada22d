"""Where every rank of the job is, for the error of a collective that did not come to its end.

A thread of each rank looks into the job's store once a second. A rank whose collective failed calls the roll there, and
the threads of the others answer where their programs are, also while these wait or sleep. Ranks that ended with an
error have left their last words. Whoever says nothing was killed or cut off.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist

from .errors import DesyncError
from .rendezvous import connect, serves_the_store

__all__ = [
    "attend",
    "fails_by_arguments",
    "is_attended",
    "last_words",
    "leave",
    "raise_desync",
    "take",
    "tells_of_peers",
    "whereabouts",
    "whereabouts_of",
]

INTERVAL = 1.0  # seconds between two looks into the store
PATIENCE = 2.5  # seconds for all answers to come
PACKAGE = str(Path(__file__).parent)
LIBRARIES = (PACKAGE, str(Path(torch.__file__).parent), sysconfig.get_path("stdlib"), "<")
C10D = str(Path(dist.__file__).parent / "distributed_c10d.py")
COLLECTIVES = (os.path.join(PACKAGE, "communicators"), os.path.join(PACKAGE, "mpi_backend.py"), C10D)
OF_ARGUMENTS = "Invalid scalar type"  # what Gloo's threads say of a dtype, on every rank
OF_PEERS = ("connect", "timed out", "timeout", "closed", "reset by", "waited")  # in what Gloo, NCCL and we say of them

_attendance: _Attendance | None = None


def attend(rank: int, hosts: Sequence[str]) -> None:
    """Answer roll calls from now on, as `rank` of a job whose ranks are on these hosts."""
    global _attendance
    _attendance = _Attendance(rank, hosts)


def is_attended() -> bool:
    """Return whether this rank answers roll calls."""
    return _attendance is not None


def _forget() -> None:
    global _attendance
    _attendance = None


os.register_at_fork(after_in_child=_forget)  # a forked child is no rank


def leave() -> None:
    """Answer no more."""
    global _attendance
    if _attendance is not None:
        _attendance.leave()
    _attendance = None


def take(ranks: Iterable[int], here: str | None = None) -> str:
    """Return where these ranks of the job are, a line for each place; "" in a job without roll calls.

    Args:
        ranks: of the job.
        here: where this one is; None: where it is now.
    """
    if _attendance is None:
        return ""
    report: list[str] = []
    asking = threading.Thread(target=_attendance.call, args=(list(ranks), here or whereabouts(), report), daemon=True)
    asking.start()
    asking.join(2 * PATIENCE)  # the network may be gone
    return report[0] if report else _attendance.unreachable()


def last_words(error: BaseException) -> None:
    """Leave what the other ranks are told of this one from now on: the error that ends it."""
    if _attendance is not None:
        saying = threading.Thread(target=_attendance.end, args=(error,), daemon=True)
        saying.start()
        saying.join(INTERVAL)


def fails_by_arguments(error: BaseException) -> bool:
    """Return whether a collective that had started failed by its arguments, on all ranks alike."""
    return OF_ARGUMENTS in str(error)


def tells_of_peers(error: BaseException) -> bool:
    """Return whether the error that ends a program is that of a collective: it was raised in one, or tells of ranks."""
    if not isinstance(error, RuntimeError | TimeoutError) or fails_by_arguments(error):
        return False
    stack = list(traceback.walk_tb(error.__traceback__))[::-1]
    words = str(error).lower()  # those of one that C++ waits for, as DistributedDataParallel does
    return isinstance(error, TimeoutError) or bool(_collective(stack)) or any(word in words for word in OF_PEERS)


def raise_desync(error: Exception, what: str, ranks: Iterable[int]) -> NoReturn:
    """Raise the error of a collective of these ranks of the job that failed: with the roll call."""
    if isinstance(error, DesyncError):
        raise error
    raise DesyncError("\n".join(filter(None, [what, take(ranks)]))) from error


def whereabouts() -> str:
    """Return where this process is: the collective, if it is in one, and the line of the program."""
    frames = sys._current_frames()
    stacks = {thread: list(traceback.walk_stack(frame)) for thread, frame in frames.items()}
    main = stacks.pop(threading.main_thread().ident or 0)
    return _describe(main, [main, *stacks.values()])


def whereabouts_of(error: BaseException) -> str:
    """Return where the program was when it raised the error."""
    stack = list(traceback.walk_tb(error.__traceback__))[::-1]
    return _describe(stack, [stack])


class _Attendance:
    """This rank's part in the roll calls of a job."""

    def __init__(self, rank: int, hosts: Sequence[str]):
        self.rank = rank
        self.hosts = hosts
        self.words = ""  # where a collective failed, or what ended this rank
        self.ended = False
        self.leaving = threading.Event()
        self.thread = threading.Thread(target=self._answer, name="syncnorm roll call", daemon=True)
        self.thread.start()

    def leave(self) -> None:
        """Answer no more. The rank that serves the store lets the others leave it first."""
        self.leaving.set()
        self.thread.join(INTERVAL)
        if self.rank == 0 and serves_the_store():
            with contextlib.suppress(RuntimeError):
                store = connect()
                store.set("closing", "")
                deadline = time.monotonic() + 2 * INTERVAL
                while store.add("left", 0) < len(self.hosts) and time.monotonic() < deadline:
                    time.sleep(INTERVAL / 100)

    def end(self, error: BaseException) -> None:
        """Answer with the error, or with the place of the collective that failed."""
        if not isinstance(error, DesyncError):
            self.words = f"ended with {type(error).__name__}: {error}".splitlines()[0]
        self.ended = True
        with contextlib.suppress(RuntimeError):  # whoever served the store has ended
            connect().set(f"last words of {self.rank}", self.words)

    def call(self, ranks: list[int], here: str, report: list[str]) -> None:
        """Call the roll and append what came: where each rank is, this one `here`."""
        try:
            self.words = here
            store = connect()
            store.set(f"last words of {self.rank}", here)
            number = store.add("roll calls", 1)
            store.set(f"{number} of {self.rank}", here)
            deadline = time.monotonic() + PATIENCE
            while not store.check([f"{number} of {rank}" for rank in ranks]) and time.monotonic() < deadline:
                time.sleep(INTERVAL / 20)
            places: dict[str, list[int]] = {}
            for rank in ranks:
                keys = [key for key in (f"{number} of {rank}", f"last words of {rank}") if store.check([key])]
                words = store.get(keys[0]).decode() if keys else "MISSING: no answer"
                places.setdefault(words, []).append(rank)
        except RuntimeError:
            report.append(self.unreachable())
        else:
            report.append("\n".join(f"  {self._name(some)}: {place}" for place, some in places.items()))

    def unreachable(self) -> str:
        there = [rank for rank, host in enumerate(self.hosts) if host == self.hosts[0]]
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        return f"  MISSING: {self._name(there)}, or the way there: no answer from the job's store at {where}"

    def _answer(self) -> None:
        with contextlib.suppress(RuntimeError):  # whoever served the store has ended
            store = connect()
            answered = 0
            while not self.leaving.wait(INTERVAL) and not store.check(["closing"]):
                called = store.add("roll calls", 0)
                for number in range(answered + 1, called + 1):
                    store.set(f"{number} of {self.rank}", self.words if self.ended else whereabouts())
                answered = called
            store.add("left", 1)

    def _name(self, ranks: Sequence[int]) -> str:
        hosts = dict.fromkeys(self.hosts[rank] for rank in ranks)
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} on {', '.join(hosts)}"


Stack = list[tuple[FrameType, int]]  # frames and the numbers of their lines, the innermost first


def _describe(stack: Stack, stacks: list[Stack]) -> str:
    """Return the first collective that there is on the stacks, and the innermost line of one that is no library's."""
    collectives = [name for name in map(_collective, stacks) if name]
    own = [item for item in stack if not item[0].f_code.co_filename.startswith(LIBRARIES)]
    frame, number = (own or stack)[0]
    path, function = frame.f_code.co_filename, frame.f_code.co_name
    line = f"at {path}:{number} in {function}: {linecache.getline(path, number).strip()}"
    return f"in {collectives[0] if collectives else 'no collective'}, {line}"


def _collective(stack: Stack) -> str | None:
    """Return the name of the outermost collective on a stack."""
    inside = [frame for frame, _ in stack if frame.f_code.co_filename.startswith(COLLECTIVES)]
    return str(getattr(inside[-1].f_locals.get("self"), "name", inside[-1].f_code.co_name)) if inside else None
