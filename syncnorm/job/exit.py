"""How a rank ends: at the end of its program, with an unhandled exception, or by C++'s std::terminate.

The other ranks learn why this one ended. Under MPI, an unhandled exception aborts the job.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import io
import os
import sys
import time
from types import TracebackType
from typing import TextIO

import torch.distributed as dist

from ..errors import DesyncError
from . import desync, forks
from .terminate import before_terminate, close_connections

__all__ = ["abort_on_exception", "destroy_process_group", "report_exception"]


def destroy_process_group() -> None:
    """Destroy torch.distributed's default group when Python exits."""
    if forks.is_inherited(None):
        return
    desync.post_exit_reason()  # before the connections close, because the others' queries follow
    gc.collect()  # DistributedDataParallel refers to the group in cycles
    if dist.is_initialized():
        dist.destroy_process_group()
    time.sleep(0.05)  # Gloo's threads need the GIL to free the last messages; after Python's end they would abort


def report_exception(rank: int, hosts: list[str]) -> None:
    """Answer the queries of other ranks, and report an unhandled exception to them and on stderr."""
    desync.start(rank, hosts)
    atexit.register(desync.stop)
    before_terminate(functools.partial(_report_terminate, rank, hosts))
    process = os.getpid()
    print_exception = sys.excepthook  # torch.distributed's own

    def report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if os.getpid() != process or _is_interactive():
            print_exception(kind, error, traceback)
            return
        in_collective = desync.is_peer_failure(error)
        is_reported = isinstance(error, DesyncError)
        here = desync.location_of(error)
        desync.post_exit_reason(here if in_collective and not is_reported else error)
        print_exception(kind, error, traceback)
        print(f"rank {rank} of {len(hosts)} on {hosts[rank]} ended with {kind.__name__}", file=sys.stderr)
        if in_collective and not is_reported:
            print(desync.collect(range(len(hosts)), here), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if in_collective:
            time.sleep(1)  # launchers end all ranks after the first, and the others still have to report

    sys.excepthook = report


def _report_terminate(rank: int, hosts: list[str]) -> None:
    """Print where all ranks are before C++ ends this one, and tell the others where this one is."""
    here = desync.current_location()
    desync.post_exit_reason(f"ended by C++ {here}")
    sys.stdout.flush()
    print(
        f"rank {rank} of {len(hosts)} on {hosts[rank]} is ended by C++, whose message follows. If Gloo received data "
        "of an unexpected size, the ranks are at different layers or collectives:\n"
        + desync.collect(range(len(hosts)), here),
        file=sys.stderr,
        flush=True,
    )
    close_connections(keep_port=int(os.environ["MASTER_PORT"]))  # the store's
    time.sleep(2 * desync.INTERVAL)  # launchers end all ranks after the first, and the others still have to report
    desync.stop()


@functools.cache  # once per process
def abort_on_exception() -> None:
    """Make an unhandled exception of one rank abort the MPI job. Otherwise the other ranks would wait forever."""
    from ..mpi.library import MPI

    process = os.getpid()
    report = sys.excepthook

    def abort(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if os.getpid() != process or _is_interactive():
            report(kind, error, traceback)
            return
        with contextlib.redirect_stderr(_terminal()):
            report(kind, error, traceback)
            print("aborting the MPI job", file=sys.stderr, flush=True)
        time.sleep(0.2)  # MPICH's mpiexec may drop output that was printed just before
        MPI.COMM_WORLD.Abort(1)

    sys.excepthook = abort


def _is_interactive() -> bool:
    """Return whether the program continues at a prompt after an unhandled exception."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive or sys.flags.inspect)


def _terminal() -> TextIO:
    """Return the real stderr: torch.distributed's hook replaces it while it calls the previous hook."""
    return sys.__stderr__ if isinstance(sys.stderr, io.StringIO) and sys.__stderr__ is not None else sys.stderr
