"""From the environment that a launcher leaves to the communicator of the job: `torchrun`, `mpirun`, or neither."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import os
import socket
import struct
import sys
import time
import warnings
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from . import communicators
from .communicators import Communicator

if TYPE_CHECKING:
    from .communicators.mpi import MpiCommunicator

__all__ = ["init", "warn_if_alone_in_a_larger_job"]

RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets for torch.distributed
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # Open MPI; MPICH and Intel MPI
SIOCGIFADDR = 0x8915  # Linux's request for the address of an interface
JOB_SIZES = ("WORLD_SIZE", *MPI_SIZES, "SLURM_NTASKS")


def init(backend: str = "auto", timeout: float | timedelta | None = None) -> Communicator:
    """Join the job that this process was launched in and return the communicator of all its ranks.

    It is what `process_group=None` means from then on. A second call returns the same communicator, with the timeout of
    the first. All ranks call it.

    Args:
        backend: "nccl" or "gloo": torch.distributed, from the environment that torchrun sets (without one, a group of
            this process alone); NCCL takes the CUDA device of the local rank. "mpi": mpi4py's COMM_WORLD; an exception
            that nobody handles then ends the whole job with its traceback instead of leaving the other ranks waiting.
            "auto": an initialized torch.distributed; under torchrun NCCL if there is CUDA, else Gloo; under mpirun
            MPI; else this process alone.
        timeout: seconds (or a timedelta) after which a collective whose peers do not come raises; None: the library's
            own (torch.distributed: 30 minutes for Gloo, 10 for NCCL; MPI: never).

    Raises:
        ValueError: another backend than these, or a timeout that is not positive.
        RuntimeError: the backend is not installed, or not usable here; the job was joined with another one; the
            environment of the launcher is incomplete, or tells of several ranks where the backend finds one.
    """
    if backend not in ("auto", "nccl", "gloo", "mpi"):
        raise ValueError(f'expected backend "auto", "nccl", "gloo" or "mpi", got {backend!r}')
    limit = timedelta(seconds=timeout) if isinstance(timeout, int | float) else timeout
    if limit is not None and limit <= timedelta(0):
        raise ValueError(f"expected a positive timeout, got {timeout}")
    joined = _joined()
    if joined is not None:
        if backend != joined and backend != "auto" and joined != "undefined":  # which is one backend per device
            raise RuntimeError(f"expected one backend for the job, got {backend!r} after {joined!r}")
        return communicators.communicator()
    chosen = _detect() if backend == "auto" else backend
    if chosen == "mpi":
        communicators.set_default(_init_mpi(limit))
    elif chosen != "alone":
        _init_torch(chosen, limit)
    return communicators.communicator()


def _joined() -> str | None:
    """Return the backend that this process has joined its job with: "mpi", torch.distributed's, or None."""
    if communicators.has_default():
        return "mpi"
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return "mpi" if dist.get_backend() == "mpi4py" else dist.get_backend()


def _detect() -> str:
    """Return the backend that fits the environment: "nccl", "gloo", "mpi" or "alone"."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys() and any(name in os.environ for name in MPI_SIZES):
        return "mpi"
    if {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return "nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    return "alone"


def _refuse_to_be_alone(backend: str) -> None:
    """Raise if a launcher's environment tells of more ranks than the group of one that `backend` would give."""
    for name, ranks in _told_ranks().items():
        if ranks > 1 and name != "SLURM_NTASKS":  # which also stands in the shell of an allocation
            raise RuntimeError(
                f"expected a group of {ranks} ranks, as {name}={ranks} tells, got this process alone from {backend}: "
                'is it the backend of the launcher (init("auto") takes that), is mpi4py built for this mpirun?'
            )


def _told_ranks() -> dict[str, int]:
    """Return how many ranks each launcher's variable in the environment tells of."""
    told = {name: os.environ.get(name, "") for name in JOB_SIZES}
    return {name: int(value) for name, value in told.items() if value.isdigit()}


def _init_torch(backend: str, timeout: timedelta | None) -> None:
    if not dist.is_available():
        raise RuntimeError(f"{backend} was asked for, and this torch was built without torch.distributed")
    if backend == "nccl" and not (torch.cuda.is_available() and dist.is_nccl_available()):
        raise RuntimeError(
            "nccl was asked for, and this torch has no CUDA device or no NCCL: pip install torch built for CUDA, or "
            'take backend="gloo"'
        )
    missing = [name for name in RENDEZVOUS if name not in os.environ]
    if missing and len(missing) < len(RENDEZVOUS):
        raise RuntimeError(
            f"expected {', '.join(RENDEZVOUS)} in the environment, as torchrun sets them; not set: {', '.join(missing)}"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if backend == "nccl" else None
    if device is not None:
        torch.cuda.set_device(device)
    if missing:
        _refuse_to_be_alone(backend)
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1, device_id=device)
    else:
        dist.init_process_group(backend, timeout=timeout, device_id=device)
    atexit.register(_destroy_process_group)


def _destroy_process_group() -> None:
    gc.collect()  # DistributedDataParallel refers to the group in cycles
    if dist.is_initialized():
        dist.destroy_process_group()
    time.sleep(0.05)  # lets Gloo's threads take the GIL to drop what they sent last; without Python they would abort


def _init_mpi(timeout: timedelta | None) -> MpiCommunicator:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise RuntimeError(
            "mpi was asked for, and mpi4py with an MPI library cannot be imported: pip install 'syncnorm[mpi]', or "
            "pip install mpi4py beside the MPI of your cluster"
        ) from error
    from .communicators.mpi import MpiCommunicator

    world = MpiCommunicator(MPI.COMM_WORLD, timeout)
    if world.size == 1:
        _refuse_to_be_alone("mpi")
    if dist.is_available():
        _init_torch_on(world, timeout)
    if world.size > 1:
        _abort_the_job_on_an_exception(world)  # around torch.distributed's own hook
    return world


def _init_torch_on(world: MpiCommunicator, timeout: timedelta | None) -> None:
    """Make the ranks of `world` torch.distributed's default group, on the mpi4py backend."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from . import mpi_backend

    here = _address(world)
    server = TCPStore(here, 0, is_master=True, wait_for_workers=False) if world.rank == 0 else None
    address = world.comm.bcast(server and (here, server.port))
    store = server or TCPStore(*address)
    dist.init_process_group(mpi_backend.BACKEND, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    atexit.register(_destroy_process_group)


def _address(world: MpiCommunicator) -> str:
    """Return an address of this host that the other ranks reach: MASTER_ADDR, or one of its own that is not local."""
    if len(set(world.all_gather_object(socket.gethostname()))) == 1:
        return "127.0.0.1"
    if "MASTER_ADDR" in os.environ:
        return os.environ["MASTER_ADDR"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, interface in socket.if_nameindex():
            with contextlib.suppress(OSError):  # no IPv4 address
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()))
                if not answer[20:24].startswith(b"\x7f"):
                    return socket.inet_ntoa(answer[20:24])
    raise RuntimeError(f"expected {socket.gethostname()} to have an IPv4 address: set MASTER_ADDR to one of it")


def _abort_the_job_on_an_exception(world: MpiCommunicator) -> None:
    """Make an unhandled exception of one rank end all ranks, which else would wait for it for ever."""
    print_exception = sys.excepthook

    def abort(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        print_exception(kind, error, traceback)
        print(f"rank {world.rank} of {world.size} raised {kind.__name__}: aborting the MPI job", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        world.comm.Abort(1)

    sys.excepthook = abort


@functools.cache
def warn_if_alone_in_a_larger_job() -> None:
    """Warn, once, if the environment tells of more ranks than this process and nobody joined them."""
    for name, ranks in _told_ranks().items():
        if ranks > 1:
            warnings.warn(
                f"{name}={ranks} tells of {ranks} ranks, but SyncBatchNorm trains with the statistics of this process "
                "alone: call syncnorm.init() or torch.distributed.init_process_group() before the first step",
                stacklevel=2,
            )
            return
