"""Detect the launcher (torchrun, mpirun, srun or none) from the environment.

Launchers can be nested, and each sets its variables. The innermost launcher counts:

    a program started by              sees the variables of      joins
    torchrun, also inside mpirun/srun torchrun (and the others)  torchrun's ranks
    mpirun, also inside srun          mpirun (and srun)          mpirun's ranks
    srun                              srun                       the tasks of the step
    a shell of an allocation          SLURM_* without a step     no one: a single process

The variables do not say which launcher is the innermost. The order above is the usual one. It is wrong if mpirun or
srun was started by a process that already has RANK and WORLD_SIZE, such as a rank of torchrun. In that case:

    RANK, WORLD_SIZE        the other launcher    result
    0 of 1                  1 rank                a single process
    0 of 1                  several ranks         an error that names both: otherwise every rank would train alone
    of several ranks        any                   torchrun's ranks; joining fails if two processes have the same RANK

`mpirun -n 2 torchrun train.py` without `--nnodes 2` is also the second case. Open MPI's variables of one rank together
with MPICH's of several raise the same error. mpirun and srun are not compared, because mpirun's own daemons are a step
of srun.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterable
from typing import NamedTuple

__all__ = [
    "RENDEZVOUS",
    "LaunchInfo",
    "check_world_size",
    "detect_launcher",
    "names_several_ranks",
    "warn_if_not_joined",
]

RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torch.distributed reads
STEP = ("JOB_ID", "STEP_ID", "STEP_NODELIST", "STEP_TASKS_PER_NODE", "NODEID", "LOCALID")  # of Slurm's variables
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")


class Launcher(NamedTuple):
    """A launcher, the variables of its rank and size, which identify it, and the other variables that it sets."""

    name: str
    rank: str
    size: str
    others: tuple[str, ...] = ()


LAUNCHERS = (  # the first match counts: torchrun runs inside mpirun and srun, mpirun inside srun
    Launcher("torchrun", "RANK", "WORLD_SIZE", RENDEZVOUS[2:]),
    Launcher("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
    Launcher("mpirun", "PMI_RANK", "PMI_SIZE"),  # MPICH and Intel MPI
    Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", tuple(f"SLURM_{name}" for name in STEP)),
)


class LaunchInfo(NamedTuple):
    """The launcher of this process ("torchrun", "mpirun", "srun" or "none"), its rank and the number of ranks."""

    launcher: str
    rank: int
    size: int


@functools.cache  # joining the job sets torchrun's variables
def detect_launcher() -> LaunchInfo:
    """Return the launcher that the environment describes.

    Raises:
        RuntimeError: some variables of the launcher are missing; the message names the launcher and the variables. Or
            two launchers contradict each other; the message shows the variables of both.
    """
    known = [item for item in LAUNCHERS if {item.rank, item.size} <= os.environ.keys()]
    # srun is left out: the shell of an allocation has its rank without a step
    partial = [item for item in LAUNCHERS[:-1] if {item.rank, item.size} & os.environ.keys()]
    if not known and not partial:
        return LaunchInfo("none", 0, 1)
    name, *numbers, others = (known or partial)[0]
    if known and os.environ[known[0].size] == "1":
        _check_hidden_launchers(known[0], known[1:])
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


def _check_hidden_launchers(alone: Launcher, others: Iterable[Launcher]) -> None:
    """Raise if `alone`, which has one rank, would hide a launcher that has several."""
    for other in others:
        size = os.environ[other.size]
        inside_srun = alone.name == "mpirun" and other.name == "srun"
        if size.isdecimal() and int(size) > 1 and not inside_srun:
            raise RuntimeError(
                f"expected one launcher, got two that contradict each other: {_setting(alone)} of {alone.name}, and "
                f"{_setting(other)} of {other.name}. Unset {alone.rank} and {alone.size} to join the {size} ranks of "
                f"{other.name}, or {other.rank} and {other.size} to run a single process"
            )


def _setting(launcher: Launcher) -> str:
    """Return the variables of the rank and the size, with their values."""
    return ", ".join(f"{name}={os.environ[name]}" for name in (launcher.rank, launcher.size))


def check_world_size(backend: str) -> None:
    """Raise if the launcher started several ranks, although `backend` reports a world of size 1."""
    launcher, _, size = detect_launcher()
    if size > 1:
        raise RuntimeError(
            f"expected {size} ranks, as started by {launcher}, got a world of size 1 from {backend}: use the "
            'launcher\'s own backend (init("auto") does), and check that mpi4py is built for the MPI of this mpirun'
        )


@functools.cache
def names_several_ranks() -> str:
    """Return the variable of the environment that names several ranks, "NAME=ranks", or ""."""
    sizes = ((name, os.environ.get(name, "")) for name in SIZES)
    return next((f"{name}={ranks}" for name, ranks in sizes if ranks.isdecimal() and int(ranks) > 1), "")


@functools.cache
def warn_if_not_joined() -> None:
    """Warn once if the environment names several ranks and no process group was joined."""
    if variable := names_several_ranks():
        warnings.warn(
            f"{variable}, but no process group was joined: SyncBatchNorm uses the statistics of this process "
            "only. Call syncnorm.init() or torch.distributed.init_process_group() before the first step",
            stacklevel=2,
        )
