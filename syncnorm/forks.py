"""What a forked child of a rank has of its parent's job: it may neither use it nor free it.

Process groups, stores and MPI work by threads and connections that fork does not copy. A child that frees a group when
it exits waits for ever for threads that it does not have. One that finalizes MPI ends its parent's part in the job.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
from typing import Any, NoReturn

import torch.distributed as dist

__all__ = ["REFUSAL", "is_inherited", "keep"]

REFUSAL = (
    "expected a collective in the process that joined the job, got one in a forked child of it: train in the rank "
    "itself, or call eval() on the model in the child"
)
FINALIZED = 7  # any state of Open MPI's after that in which MPI_Finalize has begun

_kept: list[Any] = []  # what other modules hold that a child must not free
_inherited: list[Any] = []  # in a child: its parent's process groups


def keep(held: Any) -> Any:
    """Return what was given; a forked child will never free it."""
    _kept.append(held)
    return held


def is_inherited(group: dist.ProcessGroup | None) -> bool:
    """Return whether a process group (None: the default one) was made by a parent of this process."""
    return bool(_inherited) and any((group or dist.group.WORLD) is other for other in _inherited)


def _in_child() -> None:
    if dist.is_available():
        _inherited.extend(dist.distributed_c10d._world.pg_map)
    for held in (_inherited, _kept):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))  # it outlives the interpreter
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized():
        _leave_mpi_alone(mpi)


def _leave_mpi_alone(mpi: Any) -> None:
    """Make collectives raise, and mpi4py not finalize MPI at the exit of this process."""
    ours = sys.modules.get("syncnorm.communicators.mpi")
    if ours is not None:
        ours.MpiCommunicator.unusable = REFUSAL
    try:
        state = ctypes.c_int32.in_dll(ctypes.CDLL(mpi.__file__), "ompi_mpi_state")
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


os.register_at_fork(after_in_child=_in_child)
