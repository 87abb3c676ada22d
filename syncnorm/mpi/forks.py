"""MPI in a forked child of a rank: a child that finalizes MPI would end its parent's part in the job."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
from typing import Any, NoReturn

from ..job.forks import REFUSAL
from .library import MPI

__all__ = ["forbid"]

FINALIZED = 7  # any state of Open MPI's after that in which MPI_Finalize has begun


def forbid(communicators: Any) -> None:
    """Make the collectives of a class of communicators raise in a forked child."""
    _forbidden.append(communicators)


def _in_child() -> None:
    """Make collectives raise, and mpi4py not finalize MPI at the exit of this process."""
    if not MPI.Is_initialized():
        return
    for communicators in _forbidden:
        communicators.unusable = REFUSAL
    try:
        state = ctypes.c_int32.in_dll(ctypes.CDLL(MPI.__file__), "ompi_mpi_state")
    except (OSError, ValueError):  # another MPI, which keeps it to itself
        _exit_before_mpi4py()
    else:
        state.value = FINALIZED


def _exit_before_mpi4py() -> None:
    """Make the last of Python's own exit functions end the process: mpi4py finalizes MPI after them.

    Python does not tell them the status that `raise SystemExit(status)` asks for; it becomes 0.
    """
    statuses = [0]
    exit = sys.exit

    def noted(status: Any = None) -> NoReturn:
        statuses.append(status if isinstance(status, int) else int(status is not None))
        exit(status)

    def end() -> None:
        atexit.unregister(end)
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit((1 if hasattr(sys, "last_value") else statuses[-1]) & 255)

    sys.exit = noted
    atexit.register(end)


_forbidden: list[Any] = []
os.register_at_fork(after_in_child=_in_child)
