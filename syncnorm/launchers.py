"""What the launcher of this process left in the environment: torchrun, mpirun (of any MPI), srun, or nobody."""

from __future__ import annotations

import functools
import os
import warnings
from typing import NamedTuple

__all__ = ["RENDEZVOUS", "Launched", "launched", "refuse_to_be_alone", "warn_if_alone_in_a_larger_job"]

RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torch.distributed reads
STEP = ("JOB_ID", "STEP_ID", "STEP_NODELIST", "STEP_TASKS_PER_NODE", "NODEID", "LOCALID")  # of Slurm's variables
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")


class Launcher(NamedTuple):
    """A launcher and its variables: those of the rank and the size, by which it is known, and what else it sets."""

    name: str
    rank: str
    size: str
    others: tuple[str, ...] = ()


LAUNCHERS = (  # the first to be recognised counts: torchrun runs inside of mpirun and srun, mpirun inside of srun
    Launcher("torchrun", "RANK", "WORLD_SIZE", RENDEZVOUS[2:]),
    Launcher("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
    Launcher("mpirun", "PMI_RANK", "PMI_SIZE"),  # MPICH and Intel MPI
    Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", tuple(f"SLURM_{name}" for name in STEP)),
)


class Launched(NamedTuple):
    """Who started this process ("torchrun", "mpirun", "srun" or "none"), and which rank of how many it is."""

    launcher: str
    rank: int
    size: int


@functools.cache  # joining the job adds what torchrun would set
def launched() -> Launched:
    """Return what the environment tells of the launcher.

    Raises:
        RuntimeError: it tells half of it; with the launcher that was recognised and the variables that are not set.
    """
    known = [item for item in LAUNCHERS if {item.rank, item.size} <= os.environ.keys()]
    half = [item for item in LAUNCHERS[:-1] if {item.rank, item.size} & os.environ.keys()]  # srun's shell sets its rank
    if not known and not half:
        return Launched("none", 0, 1)
    name, *numbers, others = (known or half)[0]
    missing = [variable for variable in (*numbers, *others) if variable not in os.environ]
    if missing:
        raise RuntimeError(
            f"expected {', '.join((*numbers, *others))} in the environment, as {name} sets them; "
            f"not set: {', '.join(missing)}"
        )
    rank, size = (os.environ[variable] for variable in numbers)
    if not (rank.isdigit() and size.isdigit() and int(rank) < int(size)):
        raise RuntimeError(
            f"expected {numbers[0]} to be a rank below {numbers[1]}, as {name} sets them; got {rank} and {size}"
        )
    return Launched(name, int(rank), int(size))


def refuse_to_be_alone(backend: str) -> None:
    """Raise if the launcher tells of more ranks than the group of one that `backend` gives."""
    launcher, _, size = launched()
    if size > 1:
        raise RuntimeError(
            f"expected a group of {size} ranks, as {launcher} tells, got this process alone from {backend}: "
            'is it the backend of the launcher (init("auto") takes that), is mpi4py built for this mpirun?'
        )


@functools.cache
def warn_if_alone_in_a_larger_job() -> None:
    """Warn, once, if the environment tells of more ranks than this process and nobody joined them."""
    for name in SIZES:
        ranks = os.environ.get(name, "")
        if ranks.isdigit() and int(ranks) > 1:
            warnings.warn(
                f"{name}={ranks} tells of {ranks} ranks, but SyncBatchNorm trains with the statistics of this process "
                "alone: call syncnorm.init() or torch.distributed.init_process_group() before the first step",
                stacklevel=2,
            )
            return
