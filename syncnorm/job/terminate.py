"""C++'s std::terminate, which ends a process when a thread of a library throws: what is said before.

Gloo's thread throws where a message is longer than the one that its rank waits for: the ranks are at collectives of
different sizes. Nothing can catch that. Its own words name neither the rank nor its peers.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import socket
import threading
from collections.abc import Callable

__all__ = ["before_terminate", "hang_up"]

_HANDLER = ctypes.CFUNCTYPE(None)
_SET_TERMINATE = "_ZSt13set_terminatePFvvE"  # std::set_terminate(void (*)())


def before_terminate(say: Callable[[], None]) -> None:
    """Call `say` when C++ ends this process, from any thread and at most once; then it ends as it would have.

    That thread waits for the GIL, which the main thread gives up while it waits in a collective. With another C++
    library than libstdc++, nothing is called.
    """
    try:
        set_terminate = getattr(ctypes.CDLL("libstdc++.so.6"), _SET_TERMINATE)
    except (OSError, AttributeError):
        return
    set_terminate.argtypes, set_terminate.restype = [ctypes.c_void_p], ctypes.c_void_p
    process, first = os.getpid(), threading.Lock()

    def handle() -> None:
        if os.getpid() == process:
            first.acquire()  # the second thread waits here until the first one has ended the process
            with contextlib.suppress(Exception):
                say()
        _HANDLER(previous)()

    handler = _HANDLER(handle)
    previous = set_terminate(ctypes.cast(handler, ctypes.c_void_p))
    atexit.register(lambda: (set_terminate(previous), handler))  # keeps the handler, which Python must outlive


def hang_up(but: int) -> None:
    """Shut down the TCP connections of this process, but for those at one port: collectives of its peers fail."""
    with contextlib.suppress(OSError):  # not Linux
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as connection:
                ends = connection.getsockname(), connection.getpeername()
                if connection.family in (socket.AF_INET, socket.AF_INET6) and but not in [end[1] for end in ends]:
                    connection.shutdown(socket.SHUT_RDWR)
