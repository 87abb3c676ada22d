"""Run a command with a hard time limit, and leave none of its processes behind."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

GRACE = 5.0  # seconds after which a killed process is given up
INTERRUPTED = 13.0  # seconds, of the limit, for an interrupted command to write what it has; pytest-xdist takes 10
PR_SET_CHILD_SUBREAPER = 36


class Ended(NamedTuple):
    """How a command ended: its exit status, the seconds that it took, and whether it was over its limit."""

    status: int
    seconds: float
    late: bool


def adopt_orphans():
    """Become the parent of each descendant whose own parent ends, so that `run` finds them all. Linux only."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run(command, limit, log, **options):
    """Run a command in a session of its own, with its output in `log`; then kill what is left of it.

    Shortly before the limit, in seconds, it is interrupted as by Ctrl-C, and at the limit killed. Options go to Popen.
    """
    begin = time.monotonic()
    grace = min(INTERRUPTED, limit / 4)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **options
    )
    try:
        late = not _ends(process, limit - grace)
        if late:
            process.send_signal(signal.SIGINT)
            _ends(process, grace)
    finally:
        _kill(process)
    status = -signal.SIGKILL if process.returncode is None else process.returncode
    return Ended(status, time.monotonic() - begin, late)


def _ends(process, seconds):
    """Wait for a process; return whether it has ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(seconds, 0))
    return process.returncode is not None


def _kill(process):
    """Kill a child and all that it started, in whatever session, by their ids; wait a while for their end."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    _ends(process, GRACE)  # not for ever: a process that waits for a driver may not end
    deadline = time.monotonic() + GRACE
    while (left := descendants()) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)  # an orphan that this process adopted
        time.sleep(0.01)


def descendants():
    """Return the ids of all processes below this one."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            # after the name, which may hold spaces and parentheses, come the state and the parent
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, level = [], {os.getpid()}
    while level := {pid for pid, parent in parents.items() if parent in level}:
        found += level
    return found
