"""From the environment that a launcher leaves to the communicator of the job: `torchrun`, `mpirun`, or neither."""

from __future__ import annotations

import atexit
import functools
import gc
import os
import sys
import time
import warnings
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from . import communicators
from .communicators import Communicator
from .rendezvous import store_over_mpi

if TYPE_CHECKING:
    from .communicators.mpi import MpiCommunicator

__all__ = ["init", "launcher", "warn_if_alone_in_a_larger_job"]

RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets for torch.distributed
TORCH_RANKS = {"RANK", "WORLD_SIZE"}  # those of them that no one sets but for torch.distributed
FAST_IALLREDUCE = ("OMPI_MCA_coll_libnbc_iallreduce_algorithm", "3")  # Open MPI's own choice is 3 times slower at 25 MB
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # Open MPI; MPICH and Intel MPI
JOB_SIZES = ("WORLD_SIZE", *MPI_SIZES, "SLURM_NTASKS")


def init(backend: str = "auto", timeout: float | timedelta | None = None) -> Communicator:
    """Join the job that this process was launched in and return the communicator of all its ranks.

    It is what `process_group=None` means from then on. A second call returns the same communicator, with the timeout of
    the first. All ranks call it.

    Args:
        backend: "nccl" or "gloo": torch.distributed, from the environment that torchrun sets, or under mpirun by an
            address sent over MPI (with neither, a group of this process alone); NCCL takes the CUDA device of the
            local rank. "mpi": mpi4py's COMM_WORLD, and torch.distributed on it. Under mpirun an exception
            that nobody handles then ends the whole job with its traceback instead of leaving the other ranks waiting.
            "auto": an initialized torch.distributed; under torchrun NCCL if each rank has a CUDA device, else Gloo;
            under mpirun MPI; else this process alone.
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
    if _under_mpi() and not os.environ.keys() >= TORCH_RANKS:
        return "mpi"
    if TORCH_RANKS & os.environ.keys():
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # NCCL takes one rank on a device
        return "nccl" if dist.is_nccl_available() and ranks_here <= torch.cuda.device_count() else "gloo"
    return "alone"


def _under_mpi() -> bool:
    return any(name in os.environ for name in MPI_SIZES)


def launcher() -> str:
    """Return which launcher's environment this is: "torchrun", "mpirun" or "none"."""
    return {"nccl": "torchrun", "gloo": "torchrun", "mpi": "mpirun", "alone": "none"}[_detect()]


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
    if not missing:
        _make_default_group(backend, timeout, int(os.environ.get("LOCAL_RANK", "0")))
    elif TORCH_RANKS & os.environ.keys():
        raise RuntimeError(
            f"expected {', '.join(RENDEZVOUS)} in the environment, as torchrun sets them; not set: {', '.join(missing)}"
        )
    elif _under_mpi():
        world = _mpi_world(backend, timeout)
        store = store_over_mpi(world)
        _make_default_group(backend, timeout, world.local_rank(), store=store, rank=world.rank, world_size=world.size)
        _abort_the_job_on_an_exception(world)
    else:
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        _make_default_group(backend, timeout, 0, store=store, rank=0, world_size=1)


def _make_default_group(backend: str, timeout: timedelta | None, local_rank: int, **rendezvous: Any) -> None:
    device = None
    if backend == "nccl":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timeout, device_id=device, **rendezvous)
    atexit.register(_destroy_process_group)


def _destroy_process_group() -> None:
    gc.collect()  # DistributedDataParallel refers to the group in cycles
    if dist.is_initialized():
        dist.destroy_process_group()
    time.sleep(0.05)  # lets Gloo's threads take the GIL to drop what they sent last; without Python they would abort


def _init_mpi(timeout: timedelta | None) -> MpiCommunicator:
    world = _mpi_world("mpi", timeout)
    if dist.is_available():
        from . import mpi_backend

        store = store_over_mpi(world)
        _make_default_group(mpi_backend.BACKEND, timeout, 0, store=store, rank=world.rank, world_size=world.size)
    _abort_the_job_on_an_exception(world)  # around torch.distributed's own hook
    return world


def _mpi_world(backend: str, timeout: timedelta | None) -> MpiCommunicator:
    """Return MPI's world, in which `backend` is to run."""
    os.environ.setdefault(*FAST_IALLREDUCE)  # read when MPI starts, which the import does if nobody did before
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise RuntimeError(
            f"{backend} was asked for under MPI, and mpi4py with an MPI library cannot be imported: "
            "pip install 'syncnorm[mpi]', or pip install mpi4py beside the MPI of your cluster"
        ) from error
    from .communicators.mpi import MpiCommunicator

    world = MpiCommunicator(MPI.COMM_WORLD, timeout)
    if world.size == 1:
        _refuse_to_be_alone(backend)
    return world


def _abort_the_job_on_an_exception(world: MpiCommunicator) -> None:
    """Make an unhandled exception of one rank end all ranks, which else would wait for it for ever."""
    if world.size == 1:
        return
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
