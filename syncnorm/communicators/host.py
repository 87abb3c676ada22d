"""Which memory a process can share with others, and whether another process still runs."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from . import segment

__all__ = ["has_ended", "host_of_this_process", "start_of"]


def host_of_this_process() -> str:
    """Return a text that is equal for two processes if they can share memory and see each other.

    Raises:
        OSError: there is no /dev/shm.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    processes = os.readlink("/proc/self/ns/pid")  # containers may have ids and a /dev/shm of their own
    memory = os.stat(segment.FOLDER)
    return f"{socket.gethostname()} {boot} {processes} {memory.st_dev}:{memory.st_ino} user {os.getuid()}"


def start_of(process: int) -> str:
    """Return when a process of this host started, in ticks since boot, or "" if it has ended."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        if fields[0] not in "ZX":  # zombie or dead
            return fields[19]
    return ""


def has_ended(process: int, start: str) -> bool:
    """Return whether the process that started then has ended. Another one may have its id now."""
    return start_of(process) != start
