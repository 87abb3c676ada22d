"""Unfinished MPI calls and their memory, kept alive until MPI is done with them.

MPI may write to the memory of a call until the call is complete. Calls that were never waited for, or that timed out,
are kept here with their memory. If MPI is still not done when Python exits, the memory is never freed.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from .library import MPI

__all__ = ["hold", "release", "watch"]

EXIT_TIMEOUT = 5.0  # seconds to wait at exit for calls that were never waited for
INTERVAL = 50e-6  # seconds between two polls of the thread
OWNER = os.getpid()  # forked children have no MPI

_held: dict[int, tuple[Callable[[], bool], Any]] = {}
_watched: list[Callable[[], bool]] = []
_changed = threading.Condition()
_watcher: threading.Thread | None = None
_ending = False


def hold(is_over: Callable[[], bool], memory: Any) -> None:
    """Keep `memory` alive until `is_over()` is true, which means that MPI is done with it."""
    if _held:
        progress()
    _held[id(memory)] = is_over, memory


def release(memory: Any) -> None:
    """Stop keeping `memory`, because MPI is done with it."""
    _held.pop(id(memory), None)


def progress() -> None:
    """Let MPI make progress on what is held, and release what it has finished."""
    for key, (is_over, _) in list(_held.items()):
        if _is_over(is_over):
            _held.pop(key, None)


def _is_over(is_over: Callable[[], bool]) -> bool:
    try:
        return is_over()
    except MPI.Exception:  # an error ends a call too
        return True


def watch(is_settled: Callable[[], bool]) -> None:
    """Call `is_settled` in a thread until it returns True, for callers that wait in C++."""
    global _watcher
    with _changed:
        _watched.append(is_settled)
        if _watcher is None:
            _watcher = threading.Thread(target=_watch, name="syncnorm MPI progress", daemon=True)
            _watcher.start()
        _changed.notify()


def _watch() -> None:
    while True:
        with _changed:
            while not _watched and not _ending:
                _changed.wait()
            if _ending:
                return
            watched = list(_watched)
        for is_settled in watched:
            if is_settled():
                with _changed:
                    _watched.remove(is_settled)
        time.sleep(INTERVAL)


@atexit.register
def _end() -> None:
    """Complete what is held, or never free its memory, because MPI_Finalize runs after Python's exit functions."""
    global _ending
    if os.getpid() != OWNER or MPI.Is_finalized():
        return
    with _changed:
        _ending = True
        _changed.notify()
    if _watcher is not None:
        _watcher.join(EXIT_TIMEOUT)
    deadline = time.monotonic() + EXIT_TIMEOUT
    progress()
    while _held and time.monotonic() < deadline:
        os.sched_yield()
        progress()
    for item in _held.values():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(item))
