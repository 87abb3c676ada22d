"""Where every rank of the job is, for the error of a collective that did not come to its end.

A thread of each rank looks into the job's store once a second. A rank whose collective failed calls the roll there, and
the threads of the others answer where their programs are, also while these wait or sleep. Ranks that ended have left
their last words: in order, by sys.exit, or with an error. Whoever says nothing was killed or cut off.

Each thread also leaves a sign of life there. Where rank 0 serves the store, it ends after the others: it waits at its
exit while they show such signs, for ten minutes at most. What a rank writes is written once, and never overwritten.
What other ranks wrote is shown with its control characters escaped.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import os
import reprlib
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist

from ..errors import DesyncError, printable
from .launcher import detect_launcher
from .rendezvous import connect, serves_the_store
from .store import write_once

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = [
    "collect",
    "current_location",
    "fails_by_arguments",
    "is_peer_failure",
    "is_started",
    "location_of",
    "post_exit_reason",
    "raise_desync",
    "start",
    "stop",
    "while_serving",
]

INTERVAL = 1.0  # seconds between two looks into the store
REPLY_TIMEOUT = 2.5  # seconds for all answers to come
SILENCE = 5 * INTERVAL  # seconds without a sign of life after which a rank counts as ended
SERVICE = 600.0  # seconds for which the rank that serves the store waits at most for the others to end
LONGEST = 500  # characters of what a rank says
LEFT = b"left"  # the last sign of life
LIBRARIES = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), sysconfig.get_path("stdlib"), "<")
MARK = "ISSUES_COLLECTIVES"  # variable of the modules whose functions are collectives
OF_ARGUMENTS = "Invalid scalar type"  # what Gloo's threads say of a dtype, on every rank
OF_PEERS = ("connect", "timed out", "timeout", "closed", "reset by", "waited")  # in what Gloo, NCCL and we say of them

_responder: _Responder | None = None
_progress: list[Callable[[], object]] = []


def start(rank: int, hosts: Sequence[str]) -> None:
    """Answer queries from now on, as `rank` of a job whose ranks are on these hosts."""
    global _responder
    _responder = _Responder(rank, hosts)
    _note_exit(_responder)


def while_serving(progress: Callable[[], object]) -> None:
    """Call `progress` again and again while this rank waits at its exit, so that what the others wait for goes on."""
    _progress.append(progress)


def is_started() -> bool:
    """Return whether this rank answers queries."""
    return _responder is not None


def _forget() -> None:
    global _responder
    _responder = None


os.register_at_fork(after_in_child=_forget)  # a forked child is no rank


def stop() -> None:
    """Answer no more."""
    global _responder
    if _responder is not None:
        _responder.stop()
    _responder = None


def collect(ranks: Iterable[int], here: str | None = None) -> str:
    """Return where these ranks of the job are, a line for each place; "" in a job without queries.

    Args:
        ranks: of the job.
        here: where this one is; None: where it is now.
    """
    if _responder is None:
        return ""
    report: list[str] = []
    asking = threading.Thread(
        target=_responder.call, args=(list(ranks), here or current_location(), report), daemon=True
    )
    asking.start()
    asking.join(2 * REPLY_TIMEOUT)  # the network may be gone
    return report[0] if report else _responder.unreachable()


def post_exit_reason(error: BaseException | str | None = None) -> None:
    """Leave what the other ranks are told of this one from now on: what ends it. None: the last line, or sys.exit."""
    if _responder is not None:
        words = _responder.exit if error is None else error
        saying = threading.Thread(target=_responder.end, args=(words,), daemon=True)
        saying.start()
        saying.join(2 * REPLY_TIMEOUT)  # the network may be gone


def fails_by_arguments(error: BaseException) -> bool:
    """Return whether a collective that had started failed by its arguments, on all ranks alike."""
    return OF_ARGUMENTS in str(error)


def is_peer_failure(error: BaseException) -> bool:
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
    raise DesyncError("\n".join(filter(None, [what, collect(ranks)]))) from error


def current_location() -> str:
    """Return where this process is: the collective, if it is in one, and the line of the program."""
    frames = sys._current_frames()
    stacks = {thread: list(traceback.walk_stack(frame)) for thread, frame in frames.items()}
    main = stacks.pop(threading.main_thread().ident or 0, [])  # Python may be at its exit
    return _describe(main, [main, *stacks.values()])


def location_of(error: BaseException) -> str:
    """Return where the program was when it raised the error."""
    stack = list(traceback.walk_tb(error.__traceback__))[::-1]
    return _describe(stack, [stack])


class _Responder:
    """This rank's part in the queries of a job."""

    def __init__(self, rank: int, hosts: Sequence[str]):
        self.rank = rank
        self.hosts = hosts
        self.words = ""  # where a collective failed, or what ended this rank
        self.ended = False
        self.exit = "ended normally"
        self.leaving = threading.Event()
        self.thread = threading.Thread(target=self._answer, name="syncnorm desync", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Answer no more. The rank that serves the store lets the others leave it first."""
        post_exit_reason()
        self.leaving.set()
        self.thread.join(INTERVAL)
        if self.rank == 0 and serves_the_store():
            with contextlib.suppress(RuntimeError):
                self._wait_for_others(connect())

    def end(self, error: BaseException | str) -> None:
        """Answer with what ends this rank, or with the place of the collective that failed. The first time counts."""
        if self.ended:
            return
        if isinstance(error, str):
            self.words = error
        elif not isinstance(error, DesyncError) or not self.words:
            self.words = f"ended with {type(error).__name__}: {error}".splitlines()[0]
        self.ended = True
        with contextlib.suppress(RuntimeError):
            _write_once(self._store(), f"exit reason of {self.rank}", self.words)

    def call(self, ranks: list[int], here: str, report: list[str]) -> None:
        """Call the roll and append what came: where each rank is, this one `here`."""
        try:
            self.words = here
            store = self._store()
            _write_once(store, f"failure of {self.rank}", here)
            number = store.add("queries", 1)
            _write_once(store, f"{number} of {self.rank}", here)
            deadline = time.monotonic() + REPLY_TIMEOUT
            while not self._all_said(store, number, ranks) and time.monotonic() < deadline:
                time.sleep(INTERVAL / 20)
            places: dict[str, list[int]] = {}
            for rank in ranks:
                sources = f"{number} of {rank}", f"exit reason of {rank}", f"failure of {rank}"
                key = next((key for key in sources if store.check([key])), None)
                words = "MISSING: no answer" if key is None else store.get(key).decode(errors="backslashreplace")
                places.setdefault(printable(words[:LONGEST]), []).append(rank)
        except RuntimeError:
            report.append(self.unreachable())
        else:
            report.append("\n".join(f"  {self._name(some)}: {place}" for place, some in places.items()))

    def unreachable(self) -> str:
        """Return what a rank that cannot reach the store knows of the others."""
        where = printable(f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
        if detect_launcher().launcher == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            there = [rank for rank, host in enumerate(self.hosts) if host == self.hosts[0]]
            who, server = self._name(there), "torchrun serves there. The host is unreachable, or torchrun has ended"
        else:
            who, server = self._name([0]), "this rank serves. It was ended, or its host is unreachable"
        return f"  MISSING: {who}: no answer from the job's store at {where}, which {server}"

    def _store(self) -> Store:
        """Return the job's store; RuntimeError if whoever served it has ended, as the thread knows."""
        if not self.thread.is_alive():
            raise RuntimeError("the job's store does not answer")
        return connect()

    def _all_said(self, store: Store, number: int, ranks: list[int]) -> bool:
        return all(store.check([f"{number} of {rank}"]) or store.check([f"exit reason of {rank}"]) for rank in ranks)

    def _answer(self) -> None:
        with contextlib.suppress(RuntimeError):  # whoever served the store has ended
            store = connect()
            answered = signs = 0
            while True:
                signs += 1
                store.set(f"sign of {self.rank}", str(signs))
                called = store.add("queries", 0)
                for number in range(answered + 1, called + 1):
                    _write_once(store, f"{number} of {self.rank}", self.words if self.ended else current_location())
                answered = called
                if self.leaving.wait(INTERVAL):
                    break
            store.set(f"sign of {self.rank}", LEFT.decode())

    def _wait_for_others(self, store: Store) -> None:
        """Return when all other ranks have left the store or are silent, or when they had time enough."""
        signs = {rank: (b"", time.monotonic()) for rank in range(len(self.hosts)) if rank != self.rank}
        deadline = time.monotonic() + SERVICE
        while signs and time.monotonic() < deadline:
            for rank, (last, since) in list(signs.items()):
                key = f"sign of {rank}"
                sign = store.get(key) if store.check([key]) else b""
                if sign != last:
                    signs[rank] = sign, time.monotonic()
                elif time.monotonic() - since > SILENCE:
                    del signs[rank]
                if sign == LEFT:
                    signs.pop(rank, None)
            for progress in _progress:
                progress()
            time.sleep(INTERVAL / 20)

    def _name(self, ranks: Sequence[int]) -> str:
        hosts = dict.fromkeys(printable(self.hosts[rank]) for rank in ranks)
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} on {', '.join(hosts)}"


def _write_once(store: Store, key: str, words: str) -> None:
    write_once(store, key, words[:LONGEST])


def _note_exit(attendance: _Responder) -> None:
    """Have the last words tell of a sys.exit in the main thread, which ends the program like its last line does."""
    exit = sys.exit

    @functools.wraps(exit)
    def noted(*status: Any) -> NoReturn:
        if threading.current_thread() is threading.main_thread():
            attendance.exit = f"ended by sys.exit({', '.join(map(reprlib.repr, status))})"
        exit(*status)

    sys.exit = noted


Stack = list[tuple[FrameType, int]]  # frames and the numbers of their lines, the innermost first


def _describe(stack: Stack, stacks: list[Stack]) -> str:
    """Return the first collective that there is on the stacks, and the innermost line of one that is no library's."""
    collectives = [name for name in map(_collective, stacks) if name]
    if not stack:  # an error without a traceback
        return "in no collective"
    own = [item for item in stack if not item[0].f_code.co_filename.startswith(LIBRARIES)]
    frame, number = (own or stack)[0]
    path, function = frame.f_code.co_filename, frame.f_code.co_name
    line = f"at {path}:{number} in {function}: {linecache.getline(path, number).strip()}"
    return f"in {collectives[0] if collectives else 'no collective'}, {line}"


def _issues_collectives(module: dict[str, Any]) -> bool:
    return MARK in module or module.get("__name__") == dist.distributed_c10d.__name__


def _collective(stack: Stack) -> str | None:
    """Return the name of the outermost collective on a stack, and what this rank gives to it."""
    inside = [frame for frame, _ in stack if _issues_collectives(frame.f_globals)]
    if not inside:
        return None
    given = inside[-1].f_locals
    name = str(getattr(given.get("self"), "name", inside[-1].f_code.co_name))
    tensor = given.get("tensor")
    if not isinstance(tensor, torch.Tensor):
        return name
    return f"{name} of {tensor.numel()} {str(tensor.dtype).removeprefix('torch.')}"
