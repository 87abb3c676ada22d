"""Keep a forked child of a rank from using or finalizing its parent's MPI. Finalizing would disconnect the parent."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import sys
from typing import Any, NoReturn

from ..job.forks import REFUSAL
from .library import MPI

__all__ = ["forbid"]

FINALIZED = 7  # any of Open MPI's states after the start of MPI_Finalize


def forbid(communicators: Any) -> None:
    """In a forked child, make the collectives of this class raise, and keep mpi4py from finalizing MPI at its exit."""
    os.register_at_fork(after_in_child=functools.partial(_in_child, communicators))


def _in_child(communicators: Any) -> None:
    if not MPI.Is_initialized():
        return
    communicators.unusable = REFUSAL
    try:
        state = ctypes.c_int32.in_dll(ctypes.CDLL(MPI.__file__), "ompi_mpi_state")
    except (OSError, ValueError):  # not Open MPI
        _exit_before_mpi4py()
    else:
        state.value = FINALIZED


def _exit_before_mpi4py() -> None:
    """End the process in the last of Python's exit functions, because mpi4py finalizes MPI after them.

    Exit functions do not see the status of `raise SystemExit(status)`. It becomes 0.
    """
    statuses = [0]
    exit = sys.exit

    def recording_exit(status: Any = None) -> NoReturn:
        statuses.append(status if isinstance(status, int) else int(status is not None))
        exit(status)

    def end() -> None:
        atexit.unregister(end)
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit((1 if hasattr(sys, "last_value") else statuses[-1]) & 255)

    sys.exit = recording_exit
    atexit.register(end)
