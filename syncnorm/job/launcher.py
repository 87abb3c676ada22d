"""What the launcher of this process left in the environment: torchrun, mpirun (of any MPI), srun, or nobody.

Launchers run inside one another, and each leaves its variables. The innermost one counts:

    a program started by           finds the variables of     joins
    torchrun, also in mpirun/srun  torchrun (and the others)  torchrun's ranks
    mpirun, also in srun           mpirun (and srun)          mpirun's ranks
    srun                           srun                       the tasks of the step
    a shell of an allocation       SLURM_* without a step     nobody: it is alone

The variables do not say which launcher is the innermost. The order above is the usual one, and it is wrong where mpirun
or srun was started by a process that has RANK and WORLD_SIZE already, as a rank of torchrun has. Then

    RANK, WORLD_SIZE        the other launcher    answer
    0 of 1                  1 rank                alone
    0 of 1                  several ranks         an error that names both: all ranks would train alone
    of several ranks        any                   torchrun's ranks; when ranks meet, no two may have the same RANK

The second line is also `mpirun -n 2 torchrun train.py`, which lacks `--nnodes 2`. Open MPI's variables of one rank
beside MPICH's of several are the same error. mpirun and srun are not compared: mpirun's own daemons are a step of srun.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["RENDEZVOUS", "LaunchInfo", "check_world_size", "detect_launcher", "warn_if_not_joined"]

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


class LaunchInfo(NamedTuple):
    """Who started this process ("torchrun", "mpirun", "srun" or "none"), and which rank of how many it is."""

    launcher: str
    rank: int
    size: int


@functools.cache  # joining the job adds what torchrun would set
def detect_launcher() -> LaunchInfo:
    """Return what the environment tells of the launcher.

    Raises:
        RuntimeError: it tells half of it; with the launcher that was recognised and the variables that are not set. Or
            two launchers contradict each other; with the variables of both.
    """
    known = [item for item in LAUNCHERS if {item.rank, item.size} <= os.environ.keys()]
    half = [item for item in LAUNCHERS[:-1] if {item.rank, item.size} & os.environ.keys()]  # srun's shell sets its rank
    if not known and not half:
        return LaunchInfo("none", 0, 1)
    name, *numbers, others = (known or half)[0]
    if known and os.environ[known[0].size] == "1":
        _refuse_to_hide(known[0], known[1:])
    missing = [variable for variable in (*numbers, *others) if variable not in os.environ]
    if missing:
        raise RuntimeError(
            f"expected {', '.join((*numbers, *others))} in the environment, as {name} sets them; "
            f"not set: {', '.join(missing)}"
        )
    rank, size = (os.environ[variable] for variable in numbers)
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise RuntimeError(
            f"expected {numbers[0]} to be a rank below {numbers[1]}, as {name} sets them; got {rank} and {size}"
        )
    return LaunchInfo(name, int(rank), int(size))


def _refuse_to_hide(alone: Launcher, others: Iterable[Launcher]) -> None:
    """Raise if `alone`, which tells of one rank, would hide a launcher that tells of several."""
    for other in others:
        size = os.environ[other.size]
        inside_srun = alone.name == "mpirun" and other.name == "srun"
        if size.isdecimal() and int(size) > 1 and not inside_srun:
            raise RuntimeError(
                f"expected one launcher, got two that contradict each other: {_setting(alone)} of {alone.name}, and "
                f"{_setting(other)} of {other.name}. Unset {alone.rank} and {alone.size} to join the {size} ranks of "
                f"{other.name}, or {other.rank} and {other.size} to be alone"
            )


def _setting(launcher: Launcher) -> str:
    """Return the rank and the size as the environment sets them."""
    return ", ".join(f"{name}={os.environ[name]}" for name in (launcher.rank, launcher.size))


def check_world_size(backend: str) -> None:
    """Raise if the launcher tells of more ranks than the group of one that `backend` gives."""
    launcher, _, size = detect_launcher()
    if size > 1:
        raise RuntimeError(
            f"expected a group of {size} ranks, as {launcher} tells, got this process alone from {backend}: "
            'is it the backend of the launcher (init("auto") takes that), is mpi4py built for this mpirun?'
        )


@functools.cache
def warn_if_not_joined() -> None:
    """Warn, once, if the environment tells of more ranks than this process and nobody joined them."""
    for name in SIZES:
        ranks = os.environ.get(name, "")
        if ranks.isdecimal() and int(ranks) > 1:
            warnings.warn(
                f"{name}={ranks} tells of {ranks} ranks, but SyncBatchNorm trains with the statistics of this process "
                "alone: call syncnorm.init() or torch.distributed.init_process_group() before the first step",
                stacklevel=2,
            )
            return
