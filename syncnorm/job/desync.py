"""Report where every rank of the job is when a collective fails.

A thread of each rank reads the job's store once a second. A rank whose collective failed posts a query there. The
threads of the other ranks reply with the line that their program is at, even while it is blocked. A rank that exits
leaves the reason in the store: a normal end, sys.exit or an error. A rank that does not reply was killed or is
unreachable.

Each thread also writes a heartbeat. If rank 0 serves the store, it exits last: it waits for the heartbeats to stop, up
to ten minutes. Replies and exit reasons are never overwritten. Control characters in them are escaped before they are
shown.
"""

from __future__ import annotations

import contextlib
import functools
import json
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

from ..communicators.host import has_ended, host_of_this_process, start_of
from ..communicators.label import Label
from ..errors import DesyncError, printable
from .launcher import detect_launcher
from .rendezvous import connect, serves_the_store
from .store import write_once

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = [
    "collect",
    "current_location",
    "end_of",
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

INTERVAL = 1.0  # seconds between two reads of the store
REPLY_TIMEOUT = 2.5  # seconds for all replies
HEARTBEAT_TIMEOUT = 5 * INTERVAL  # seconds without a heartbeat after which a rank counts as ended
SERVE_TIMEOUT = 600.0  # seconds that the rank that serves the store waits at most for the others to end
MAX_LENGTH = 500  # characters of a reply
LEFT = b"left"  # the last heartbeat
LIBRARIES = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), sysconfig.get_path("stdlib"), "<")
MARK = "ISSUES_COLLECTIVES"  # a variable of the modules whose functions are collectives
ARGUMENT_ERROR = "Invalid scalar type"  # Gloo's error for an unsupported dtype, raised on every rank
PEER_ERRORS = ("connect", "timed out", "timeout", "closed", "reset by", "waited")  # of Gloo, NCCL and syncnorm

_responder: _Responder | None = None
_progress: list[Callable[[], object]] = []


def start(rank: int, hosts: Sequence[str]) -> None:
    """Start to answer queries as `rank` of a job whose ranks run on these hosts."""
    global _responder
    _responder = _Responder(rank, hosts)
    _record_exit(_responder)


def while_serving(progress: Callable[[], object]) -> None:
    """Call `progress` repeatedly while this rank waits at its exit, so that the others' communication completes."""
    _progress.append(progress)


def is_started() -> bool:
    """Return whether this rank answers queries."""
    return _responder is not None


def _forget() -> None:
    global _responder
    _responder = None


os.register_at_fork(after_in_child=_forget)  # a forked child is not a rank


def stop() -> None:
    """Stop answering queries."""
    global _responder
    if _responder is not None:
        _responder.stop()
    _responder = None


def collect(ranks: Iterable[int], here: str | None = None) -> str:
    """Return where these ranks are, one line for each location, or "" if queries are not started.

    Args:
        ranks: ranks of the job.
        here: the location of this rank. Default: its current location.
    """
    if _responder is None:
        return ""
    report: list[str] = []
    asking = threading.Thread(
        target=_responder.query, args=(list(ranks), here or current_location(), report), daemon=True
    )
    asking.start()
    asking.join(2 * REPLY_TIMEOUT)  # the network may be gone
    return report[0] if report else _responder.unreachable()


def end_of(rank: int) -> str | None:
    """Return how a rank of the job has ended, or None as long as it may go on.

    A rank leaves the reason in the store when it exits. One that was killed does not, but on this host its process is
    gone. None also if queries are not started.
    """
    if _responder is None:
        return None
    store = _responder.store()
    if store.check([f"exit reason of {rank}"]):
        return printable(store.get(f"exit reason of {rank}").decode(errors="backslashreplace")[:MAX_LENGTH])
    process = _responder.ended_process(store, rank)
    return None if process is None else f"its process {process} has ended"


def post_exit_reason(error: BaseException | str | None = None) -> None:
    """Tell the other ranks why this one ends. None stands for a normal end or sys.exit."""
    if _responder is not None:
        reason = _responder.exit if error is None else error
        posting = threading.Thread(target=_responder.end, args=(reason,), daemon=True)
        posting.start()
        posting.join(2 * REPLY_TIMEOUT)  # the network may be gone


def fails_by_arguments(error: BaseException) -> bool:
    """Return whether a collective failed after its start because of its arguments, which it does on all ranks."""
    return ARGUMENT_ERROR in str(error)


def is_peer_failure(error: BaseException) -> bool:
    """Return whether an error was caused by other ranks: raised in a collective, or reporting a failed connection."""
    if not isinstance(error, RuntimeError | TimeoutError) or fails_by_arguments(error):
        return False
    stack = list(traceback.walk_tb(error.__traceback__))[::-1]
    text = str(error).lower()  # C++ code such as DistributedDataParallel's has no Python frame of the collective
    return isinstance(error, TimeoutError) or bool(_collective(stack)) or any(part in text for part in PEER_ERRORS)


def raise_desync(error: Exception, what: str, ranks: Iterable[int]) -> NoReturn:
    """Raise DesyncError for a failed collective of these ranks, with the location of each."""
    if isinstance(error, DesyncError):
        raise error
    raise DesyncError("\n".join(filter(None, [what, collect(ranks)]))) from error


def current_location() -> str:
    """Return the collective that this process is in, if any, and the line of the program."""
    frames = sys._current_frames()
    stacks = {thread: list(traceback.walk_stack(frame)) for thread, frame in frames.items()}
    main = stacks.pop(threading.main_thread().ident or 0, [])  # Python may be at its exit
    return _describe(main, [main, *stacks.values()])


def location_of(error: BaseException) -> str:
    """Return the collective and the line of the program that raised the error."""
    stack = list(traceback.walk_tb(error.__traceback__))[::-1]
    return _describe(stack, [stack])


class _Responder:
    """Answers the queries of other ranks, and issues those of this rank."""

    def __init__(self, rank: int, hosts: Sequence[str]):
        self.rank = rank
        self.hosts = hosts
        self.reason = ""  # why this rank ended, or where its collective failed
        self.ended = False
        self.exit = "ended normally"
        self.process = _this_process()
        with contextlib.suppress(RuntimeError):  # no store answers
            connect().set(f"process of {rank}", json.dumps(self.process))  # now, before anything can end it
        self.leaving = threading.Event()
        self.thread = threading.Thread(target=self._answer, name="syncnorm desync", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Stop answering. If this rank serves the store, wait until the others have left it."""
        post_exit_reason()
        self.leaving.set()
        self.thread.join(INTERVAL)
        if self.rank == 0 and serves_the_store():
            with contextlib.suppress(RuntimeError):
                self._wait_for_others(connect())

    def end(self, error: BaseException | str) -> None:
        """Reply from now on with what ends this rank, or with where its collective failed. The first call counts."""
        if self.ended:
            return
        if isinstance(error, str):
            self.reason = error
        elif not isinstance(error, DesyncError) or not self.reason:
            self.reason = f"ended with {type(error).__name__}: {error}".splitlines()[0]
        self.ended = True
        with contextlib.suppress(RuntimeError):
            _write_once(self.store(), f"exit reason of {self.rank}", self.reason)

    def query(self, ranks: list[int], here: str, report: list[str]) -> None:
        """Post a query and append to `report` where each rank is. This rank is at `here`."""
        try:
            self.reason = here
            store = self.store()
            _write_once(store, f"failure of {self.rank}", here)
            number = store.add("queries", 1)
            _write_once(store, f"{number} of {self.rank}", here)
            deadline = time.monotonic() + REPLY_TIMEOUT
            while not self._all_replied(store, number, ranks) and time.monotonic() < deadline:
                time.sleep(INTERVAL / 20)
            locations: dict[str, list[int]] = {}
            for rank in ranks:
                sources = f"{number} of {rank}", f"exit reason of {rank}", f"failure of {rank}"
                key = next((key for key in sources if store.check([key])), None)
                reply = "MISSING: no answer" if key is None else store.get(key).decode(errors="backslashreplace")
                locations.setdefault(printable(reply[:MAX_LENGTH]), []).append(rank)
        except RuntimeError:
            report.append(self.unreachable())
        else:
            report.append("\n".join(f"  {self._name(some)}: {location}" for location, some in locations.items()))

    def unreachable(self) -> str:
        """Return the report of a rank that cannot reach the store."""
        where = printable(f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
        if detect_launcher().launcher == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            there = [rank for rank, host in enumerate(self.hosts) if host == self.hosts[0]]
            who, server = self._name(there), "torchrun serves. The host is unreachable, or torchrun has ended"
        else:
            who, server = self._name([0]), "rank 0 serves. Rank 0 was ended, or its host is unreachable"
        return f"  MISSING: {who}: no answer from the job's store at {where}, which {server}"

    def store(self) -> Store:
        """Return the job's store; RuntimeError if its server has ended, in which case the thread has ended too."""
        if not self.thread.is_alive():
            raise RuntimeError("the job's store does not answer")
        return connect()

    def ended_process(self, store: Store, rank: int) -> int | None:
        """Return the process of a rank if it ran on this host and has ended, else None."""
        if not store.check([f"process of {rank}"]):
            return None
        host, process, start = json.loads(store.get(f"process of {rank}"))
        on_this_host = host == self.process[0] != ""
        return process if on_this_host and has_ended(process, start) else None

    def _all_replied(self, store: Store, number: int, ranks: list[int]) -> bool:
        return all(store.check([f"{number} of {rank}"]) or store.check([f"exit reason of {rank}"]) for rank in ranks)

    def _answer(self) -> None:
        with contextlib.suppress(RuntimeError):  # the server of the store has ended
            store = connect()
            answered = heartbeats = 0
            while True:
                heartbeats += 1
                store.set(f"heartbeat of {self.rank}", str(heartbeats))
                queries = store.add("queries", 0)
                for number in range(answered + 1, queries + 1):
                    _write_once(store, f"{number} of {self.rank}", self.reason if self.ended else current_location())
                answered = queries
                if self.leaving.wait(INTERVAL):
                    break
            store.set(f"heartbeat of {self.rank}", LEFT.decode())

    def _wait_for_others(self, store: Store) -> None:
        """Return when all other ranks have left the store or stopped their heartbeats, or after SERVE_TIMEOUT."""
        heartbeats = {rank: (b"", time.monotonic()) for rank in range(len(self.hosts)) if rank != self.rank}
        deadline = time.monotonic() + SERVE_TIMEOUT
        while heartbeats and time.monotonic() < deadline:
            for rank, (last, since) in list(heartbeats.items()):
                key = f"heartbeat of {rank}"
                heartbeat = store.get(key) if store.check([key]) else b""
                if heartbeat != last:
                    heartbeats[rank] = heartbeat, time.monotonic()
                elif (late := time.monotonic() - since) > HEARTBEAT_TIMEOUT or (
                    late > INTERVAL and self.ended_process(store, rank) is not None
                ):
                    del heartbeats[rank]
                if heartbeat == LEFT:
                    heartbeats.pop(rank, None)
            for progress in _progress:
                progress()
            time.sleep(INTERVAL / 20)

    def _name(self, ranks: Sequence[int]) -> str:
        hosts = dict.fromkeys(printable(self.hosts[rank]) for rank in ranks)
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} on {', '.join(hosts)}"


def _this_process() -> tuple[str, int, str]:
    """Return the host, the id and the start of this process, the host as "" if its other processes are not seen."""
    process = os.getpid()
    try:
        return host_of_this_process(), process, start_of(process)
    except OSError:
        return "", process, ""


def _write_once(store: Store, key: str, value: str) -> None:
    write_once(store, key, value[:MAX_LENGTH])


def _record_exit(responder: _Responder) -> None:
    """Wrap sys.exit, so that a call in the main thread becomes the exit reason."""
    exit = sys.exit

    @functools.wraps(exit)
    def recording_exit(*status: Any) -> NoReturn:
        if threading.current_thread() is threading.main_thread():
            responder.exit = f"ended by sys.exit({', '.join(map(reprlib.repr, status))})"
        exit(*status)

    sys.exit = recording_exit


Stack = list[tuple[FrameType, int]]  # frames and their line numbers, innermost first


def _describe(stack: Stack, stacks: list[Stack]) -> str:
    """Return the first collective found on the stacks, and the innermost line of `stack` that is not in a library."""
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
    """Return the name of the outermost collective on a stack, with the size and dtype of its tensor, and its layer."""
    inside = [frame for frame, _ in stack if _issues_collectives(frame.f_globals)]
    if not inside:
        return None
    arguments = inside[-1].f_locals
    name = str(getattr(arguments.get("self"), "name", inside[-1].f_code.co_name))
    tensor = arguments.get("tensor")
    if not isinstance(tensor, torch.Tensor):
        return name
    text = f"{name} of {tensor.numel()} {str(tensor.dtype).removeprefix('torch.')}"
    labels = (frame.f_locals.get("label") for frame in inside)
    label = next((label for label in labels if isinstance(label, Label)), None)
    return text if label is None else f"{text} of {label}"
