"""Call a function before C++'s std::terminate, which ends the process when a thread of a library throws.

A thread of Gloo throws if a message is longer than expected, which means that the ranks are at collectives of different
sizes. The exception cannot be caught, and its message names neither the rank nor its peers.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import socket
import threading
from collections.abc import Callable

__all__ = ["before_terminate", "close_connections"]

_HANDLER = ctypes.CFUNCTYPE(None)
_SET_TERMINATE = "_ZSt13set_terminatePFvvE"  # std::set_terminate(void (*)())


def before_terminate(report: Callable[[], None]) -> None:
    """Call `report` at most once when C++ terminates this process, from any thread. The process then ends as usual.

    The terminating thread waits for the GIL, which the main thread releases while it waits in a collective. Only
    libstdc++ is supported. With another C++ library, `report` is never called.
    """
    try:
        set_terminate = getattr(ctypes.CDLL("libstdc++.so.6"), _SET_TERMINATE)
    except (OSError, AttributeError):
        return
    set_terminate.argtypes, set_terminate.restype = [ctypes.c_void_p], ctypes.c_void_p
    process, first = os.getpid(), threading.Lock()

    def handle() -> None:
        if os.getpid() == process:
            first.acquire()  # a second thread waits here until the first one has ended the process
            with contextlib.suppress(Exception):
                report()
        _HANDLER(previous)()

    handler = _HANDLER(handle)
    previous = set_terminate(ctypes.cast(handler, ctypes.c_void_p))
    atexit.register(lambda: (set_terminate(previous), handler))  # keeps the handler alive until Python exits


def close_connections(keep_port: int) -> None:
    """Shut down this process's TCP connections except those on one port, so that its peers' collectives fail."""
    with contextlib.suppress(OSError):  # not Linux
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as connection:
                ends = connection.getsockname(), connection.getpeername()
                if connection.family in (socket.AF_INET, socket.AF_INET6) and keep_port not in [end[1] for end in ends]:
                    connection.shutdown(socket.SHUT_RDWR)
