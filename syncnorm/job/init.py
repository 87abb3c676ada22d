"""From the environment that a launcher leaves to the communicator of the job."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import io
import os
import sys
import time
from datetime import timedelta
from numbers import Real
from types import TracebackType
from typing import TextIO

import torch
import torch.distributed as dist

from .. import communicators
from ..communicators import Communicator
from ..errors import DesyncError
from . import desync, forks, rendezvous, slurm
from .launcher import check_world_size, detect_launcher
from .terminate import before_terminate, hang_up

__all__ = ["init"]

LONGEST = 2_000_000  # seconds: libraries below count milliseconds in 31 bits


def init(backend: str = "auto", timeout: float | timedelta | None = None) -> Communicator:
    """Join the job that this process was launched in and return the communicator of all its ranks.

    It is what `process_group=None` means from then on. A second call returns the same communicator, with the timeout of
    the first. All ranks call it. Under every launcher `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`,
    `MASTER_ADDR` and `MASTER_PORT` are then set as under torchrun. A process without a launcher sets no variables and
    opens no port.

    A rank that has waited for others for eight seconds says so on stderr, with their numbers. It waits for five minutes
    in all, or for `SYNCNORM_JOIN_TIMEOUT` seconds. Ranks meet only within one job, which has torchrun's id, the numbers
    of Slurm's job and step, or `SYNCNORM_JOB_ID`.

    Args:
        backend: "nccl" or "gloo": torch.distributed, under torchrun, srun or mpirun, which tells by MPI where the ranks
            meet (with no launcher, a group of this process alone); NCCL takes the CUDA device of the local rank. "mpi":
            mpi4py's COMM_WORLD, and torch.distributed on it. Under mpirun an exception that nobody handles then ends
            the whole job with its traceback instead of leaving the other ranks waiting.
            "auto": an initialized torch.distributed; under torchrun and srun NCCL if each rank has a CUDA device of its
            own, else Gloo; under mpirun MPI; else this process alone.
        timeout: seconds (or a timedelta) after which a collective whose peers do not come raises, from a millisecond to
            23 days; None: the library's own (torch.distributed: 30 minutes for Gloo, 10 for NCCL; MPI: never).

    Raises:
        ValueError: another backend than these; a timeout out of range; a MASTER_ADDR, MASTER_PORT or
            SYNCNORM_JOIN_TIMEOUT that cannot be one.
        TypeError: a timeout that is neither a number nor a timedelta.
        RuntimeError: the backend is not installed, or not usable here; the job was joined with another one; the
            environment of the launcher is incomplete, contradicts that of another launcher, or tells of several ranks
            where the backend finds one; ranks have not come in time; the port is another program's or job's; another
            process has joined as this rank, or the ranks disagree on how many they are.
    """
    if backend not in ("auto", "nccl", "gloo", "mpi"):
        raise ValueError(f'expected backend "auto", "nccl", "gloo" or "mpi", got {backend!r}')
    limit = _limit(timeout)
    joined = _joined()
    if joined is not None:
        if backend != joined and backend != "auto" and joined != "undefined":  # which is one backend per device
            raise RuntimeError(f"expected one backend for the job, got {backend!r} after {joined!r}")
        return communicators.communicator()
    if backend == "nccl" and not (torch.cuda.is_available() and dist.is_nccl_available()):
        raise RuntimeError(
            "nccl was asked for, and this torch has no CUDA device or no NCCL: pip install torch built for CUDA, or "
            'take backend="gloo"'
        )

    launcher = detect_launcher().launcher
    if backend == "auto":
        backend = {"none": "alone", "mpirun": "mpi"}.get(launcher, "nccl or gloo")
    if backend == "mpi" or launcher == "mpirun":
        _join_over_mpi(backend, limit)
    elif backend != "alone":
        _join_by_torch(backend, limit)
    return communicators.communicator()


def _limit(timeout: float | timedelta | None) -> timedelta | None:
    """Return a timeout as a timedelta."""
    if timeout is None:
        return None
    expected = "expected timeout to be a number of seconds from 0.001 to 2000000, or a timedelta of that range"
    if isinstance(timeout, bool) or not isinstance(timeout, Real | timedelta):
        raise TypeError(f"{expected}, got {timeout!r}")
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if not 0.001 <= seconds <= LONGEST:
        raise ValueError(f"{expected}, got {timeout!r}")
    return timedelta(seconds=float(seconds))


def _joined() -> str | None:
    """Return the backend that this process has joined its job with: "mpi", torch.distributed's, or None."""
    if communicators.has_default():
        return "mpi"
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return "mpi" if dist.get_backend() == "mpi4py" else dist.get_backend()


def _join_over_mpi(backend: str, timeout: timedelta | None) -> None:
    """Join MPI's world, and torch.distributed's default group of the same ranks."""
    from ..mpi.communicator import MpiCommunicator
    from ..mpi.library import MPI
    from ..mpi.rendezvous import export_rendezvous

    world = MpiCommunicator(MPI.COMM_WORLD, timeout)
    if world.size == 1:
        check_world_size("MPI")
    if dist.is_available():
        if world.size > 1 or detect_launcher().launcher != "none":
            export_rendezvous(world.comm)
        _make_default_group(backend, timeout, world.rank, world.size)
    beside = dist.group.WORLD if dist.is_available() else None
    communicators.set_default(world if backend == "mpi" else None, beside)
    if world.size > 1:
        _abort_on_an_exception()


def _join_by_torch(backend: str, timeout: timedelta | None) -> None:
    """Join torch.distributed's default group, of torchrun's or srun's ranks, or of this process."""
    if not dist.is_available():
        raise RuntimeError(f"{backend} was asked for, and this torch was built without torch.distributed")
    launcher, rank, size = detect_launcher()
    if launcher == "srun":
        slurm.export_rendezvous()
    _make_default_group(backend, timeout, rank, size)


def _make_default_group(backend: str, timeout: timedelta | None, rank: int, size: int) -> None:
    """Make torch.distributed's default group of the ranks that meet where the environment tells."""
    store, ranks = rendezvous.join(rank, size, {"gpu": _gpu()})
    if backend == "nccl or gloo":
        gpus = {other.get("gpu") for other in ranks}
        backend = "nccl" if None not in gpus and len(gpus) == len(ranks) else "gloo"
    if backend == "mpi":
        from ..mpi.backend import BACKEND

        backend = BACKEND
    device = None
    if backend == "nccl":
        device = torch.device("cuda", _local_device())
        torch.cuda.set_device(device)
    hook = sys.excepthook
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size, device_id=device)
    if desync.is_started():  # this is not the first group, and the hook is ours
        sys.excepthook = hook
    elif size > 1:
        _report_an_exception(rank, [other["host"] for other in ranks])
    atexit.unregister(_destroy_process_group)
    atexit.register(_destroy_process_group)  # before what is registered so far: the roll call outlasts the group


def _gpu() -> str | None:
    """Return the name that this rank's CUDA device has among all there are; None without one, or without NCCL."""
    if not (dist.is_nccl_available() and torch.cuda.is_available()):
        return None
    return str(torch.cuda.get_device_properties(_local_device()).uuid)


def _local_device() -> int:
    """Return the index of this rank's CUDA device; schedulers may let each rank see its own alone."""
    return int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()


def _destroy_process_group() -> None:
    if forks.is_inherited(None):
        return
    desync.post_exit_reason()  # before its connections close, after which others ask
    gc.collect()  # DistributedDataParallel refers to the group in cycles
    if dist.is_initialized():
        dist.destroy_process_group()
    time.sleep(0.05)  # lets Gloo's threads take the GIL to drop what they sent last; without Python they would abort


def _report_an_exception(rank: int, hosts: list[str]) -> None:
    """Answer roll calls, and tell the other ranks of what ends this one."""
    desync.start(rank, hosts)
    atexit.register(desync.stop)
    before_terminate(functools.partial(_say_before_terminate, rank, hosts))
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
            time.sleep(1)  # so that the others' reports appear too: launchers end all ranks after the first

    sys.excepthook = report


def _say_before_terminate(rank: int, hosts: list[str]) -> None:
    """Write where all ranks are before C++ ends this one, and leave the same of it to the others."""
    here = desync.current_location()
    desync.post_exit_reason(f"ended by C++ {here}")
    sys.stdout.flush()
    print(
        f"rank {rank} of {len(hosts)} on {hosts[rank]} is ended by C++, whose words follow. If Gloo received data of "
        "another size than it expected, ranks are at different layers or collectives:\n"
        + desync.collect(range(len(hosts)), here),
        file=sys.stderr,
        flush=True,
    )
    hang_up(but=int(os.environ["MASTER_PORT"]))  # which is the store's
    time.sleep(2 * desync.INTERVAL)  # launchers end all ranks after the first: the others report before that
    desync.stop()


@functools.cache  # once in a process
def _abort_on_an_exception() -> None:
    """Make an unhandled exception of one rank end all ranks, which else would wait for it for ever."""
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
        time.sleep(0.2)  # MPICH's mpiexec does not read to the end what was printed just before
        MPI.COMM_WORLD.Abort(1)

    sys.excepthook = abort


def _is_interactive() -> bool:
    """Return whether the program goes on at a prompt after an exception that nobody handled."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive or sys.flags.inspect)


def _terminal() -> TextIO:
    """Return stderr: torch.distributed's hook replaces it while it runs an older one, which may not return."""
    return sys.__stderr__ if isinstance(sys.stderr, io.StringIO) and sys.__stderr__ is not None else sys.stderr
