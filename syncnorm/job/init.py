"""Join the job that the launcher's environment describes."""

from __future__ import annotations

import atexit
import os
import sys
from datetime import timedelta
from numbers import Real

import torch
import torch.distributed as dist

from .. import communicators
from ..communicators import Communicator
from . import desync, rendezvous, slurm
from .exit import abort_on_exception, destroy_process_group, report_exception
from .launcher import check_world_size, detect_launcher

__all__ = ["init"]

MAX_TIMEOUT = 2_000_000  # seconds: the libraries count milliseconds in 31 bits


def init(backend: str = "auto", timeout: float | timedelta | None = None) -> Communicator:
    """Join the job that this process was launched in and return the communicator of all its ranks.

    All ranks must call this function. Afterwards `process_group=None` means this communicator. A second call returns
    the same communicator and keeps the timeout of the first.

    On return `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` are set as
    torchrun sets them, whatever the launcher. Without a launcher, no variable is set and no port is opened.

    After eight seconds, a rank that still waits for others prints their numbers on stderr. After five minutes, or
    `SYNCNORM_JOIN_TIMEOUT` seconds, it raises. Only ranks of the same job join each other. The job is identified by
    torchrun's id, by the numbers of Slurm's job and step, or by `SYNCNORM_JOB_ID`.

    Args:
        backend: one of

            - "nccl" or "gloo": torch.distributed, under torchrun, srun or mpirun. Under mpirun, the address of rank 0
              is broadcast over MPI. Without a launcher, the group has one process. NCCL uses the CUDA device of the
              local rank.
            - "mpi": mpi4py's COMM_WORLD, and torch.distributed on it. Under mpirun, an unhandled exception then aborts
              the job with its traceback instead of leaving the other ranks waiting.
            - "auto": torch.distributed if it is initialized. Otherwise MPI under mpirun, and under torchrun and srun
              NCCL if each rank has its own CUDA device, else Gloo. Without a launcher, this process alone.
        timeout: seconds (or a timedelta) after which a collective raises if other ranks do not join it, from a
            millisecond to 23 days. Default: the library's own (30 minutes for Gloo, 10 for NCCL, none for MPI).

    Raises:
        ValueError: the backend is unknown, the timeout is out of range, or MASTER_ADDR, MASTER_PORT or
            SYNCNORM_JOIN_TIMEOUT is invalid.
        TypeError: the timeout is neither a number nor a timedelta.
        RuntimeError: the backend is not installed or not usable here, or the job was joined with another one. Or the
            launcher's environment is incomplete, contradicts that of another launcher, or names several ranks where
            the backend finds one. Or ranks did not join in time, another program or job uses the port, another process
            joined as this rank, or the ranks disagree on the world size.
    """
    if backend not in ("auto", "nccl", "gloo", "mpi"):
        raise ValueError(f'expected backend "auto", "nccl", "gloo" or "mpi", got {backend!r}')
    limit = _limit(timeout)
    joined = _joined()
    if joined is not None:
        if backend != joined and backend != "auto" and joined != "undefined":  # "undefined": one backend per device
            raise RuntimeError(f"expected one backend for the job, got {backend!r} after {joined!r}")
        return communicators.communicator()
    if backend == "nccl" and not (torch.cuda.is_available() and dist.is_nccl_available()):
        raise RuntimeError(
            'expected a CUDA device and NCCL for backend="nccl", and at least one is missing: install a CUDA build of '
            'PyTorch, or pass backend="gloo"'
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
    if not 0.001 <= seconds <= MAX_TIMEOUT:
        raise ValueError(f"{expected}, got {timeout!r}")
    return timedelta(seconds=float(seconds))


def _joined() -> str | None:
    """Return the backend that this process joined its job with, or None before it did."""
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
    default_group = dist.group.WORLD if dist.is_available() else None
    communicators.set_default(world if backend == "mpi" else None, default_group)
    if world.size > 1:
        abort_on_exception()


def _join_by_torch(backend: str, timeout: timedelta | None) -> None:
    """Join torch.distributed's default group: the ranks of torchrun or srun, or this process."""
    if not dist.is_available():
        raise RuntimeError(
            f"expected torch.distributed for {backend}, got a PyTorch build without it: install another build"
        )
    launcher, rank, size = detect_launcher()
    if launcher == "srun":
        slurm.export_rendezvous()
    _make_default_group(backend, timeout, rank, size)


def _make_default_group(backend: str, timeout: timedelta | None, rank: int, size: int) -> None:
    """Make torch.distributed's default group of the ranks that join at MASTER_ADDR and MASTER_PORT."""
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
    if desync.is_started():  # not the first group, so the hook is already ours
        sys.excepthook = hook
    elif size > 1:
        report_exception(rank, [other["host"] for other in ranks])
    atexit.unregister(destroy_process_group)
    atexit.register(destroy_process_group)  # runs before desync.stop, so queries are answered until the group is gone


def _gpu() -> str | None:
    """Return the UUID of this rank's CUDA device, or None without a device or without NCCL."""
    if not (dist.is_nccl_available() and torch.cuda.is_available()):
        return None
    return str(torch.cuda.get_device_properties(_local_device()).uuid)


def _local_device() -> int:
    """Return the index of this rank's CUDA device. Schedulers may let each rank see only its own."""
    return int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
