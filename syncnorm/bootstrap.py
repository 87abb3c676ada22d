"""From the environment that a launcher leaves to the communicator of the job: `torchrun`, `mpirun`, or neither."""

from __future__ import annotations

import atexit
import functools
import os
import sys
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
JOB_SIZES = ("WORLD_SIZE", *MPI_SIZES, "SLURM_NTASKS")


def init(backend: str = "auto", timeout: float | timedelta | None = None) -> Communicator:
    """Join the job that this process was launched in and return the communicator of all its ranks.

    It is what `process_group=None` means from then on. A second call returns the same communicator. All ranks call it.

    Args:
        backend: "nccl" or "gloo": torch.distributed, from the environment that torchrun sets (without one, a group of
            this process alone); NCCL takes the CUDA device of the local rank. "mpi": mpi4py's COMM_WORLD; an exception
            that nobody handles then ends the whole job with its traceback instead of leaving the other ranks waiting.
            "auto": an initialized torch.distributed; under torchrun NCCL if there is CUDA, else Gloo; under mpirun
            MPI; else this process alone.
        timeout: seconds (or a timedelta) after which a collective whose peers do not come raises; None: the library's
            own (torch.distributed: 30 minutes for Gloo, 10 for NCCL; MPI: never).

    Raises:
        ValueError: another backend than these.
        RuntimeError: the backend is not installed, or not usable here; the job was joined with another one; the
            environment of the launcher is incomplete.
    """
    if backend not in ("auto", "nccl", "gloo", "mpi"):
        raise ValueError(f'expected backend "auto", "nccl", "gloo" or "mpi", got {backend!r}')
    joined = _joined()
    if joined is not None:
        if backend not in ("auto", joined):
            raise RuntimeError(f"expected one backend for the job, got {backend!r} after {joined!r}")
        return communicators.communicator()
    limit = timedelta(seconds=timeout) if isinstance(timeout, int | float) else timeout
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
    return dist.get_backend() if dist.is_available() and dist.is_initialized() else None


def _detect() -> str:
    """Return the backend that fits the environment: "nccl", "gloo", "mpi" or "alone"."""
    if any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", *RENDEZVOUS)):
        return "nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    if any(name in os.environ for name in MPI_SIZES):
        return "mpi"
    return "alone"


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
            f"expected {', '.join(RENDEZVOUS)} in the environment, as torchrun sets them, "
            f"got none of {', '.join(missing)}"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if backend == "nccl" else None
    if device is not None:
        torch.cuda.set_device(device)
    if missing:
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1, device_id=device)
    else:
        dist.init_process_group(backend, timeout=timeout, device_id=device)
    atexit.register(_destroy_process_group)


def _destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


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
    if world.size > 1:
        _abort_the_job_on_an_exception(world)
    return world


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
    for name in JOB_SIZES:
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 1:
            warnings.warn(
                f"{name}={value} tells of {value} ranks, but SyncBatchNorm trains with the statistics of this process "
                "alone: call syncnorm.init() or torch.distributed.init_process_group() before the first step",
                stacklevel=2,
            )
            return
