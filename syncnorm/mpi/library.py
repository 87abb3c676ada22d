"""The MPI library. Importing this module imports mpi4py, which initializes MPI and reads its settings."""

import os
from typing import NoReturn

from ..job.desync import raise_desync, while_serving

# Open MPI's default algorithm for non-blocking all-reduces takes three times as long for 25 MB
os.environ.setdefault("OMPI_MCA_coll_libnbc_iallreduce_algorithm", "3")

try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # without MPI, the type depends on how mpi4py was built
    raise RuntimeError(
        "expected mpi4py and an MPI library, and at least one cannot be imported: "
        "pip install 'syncnorm[mpi]', or pip install mpi4py for the MPI of your cluster"
    ) from error

__all__ = ["MPI", "raise_mpi_error", "ranks_in_the_job", "takes_threads"]

ARGUMENT_ERRORS = (  # error classes that MPI detects before it communicates
    *(MPI.ERR_ARG, MPI.ERR_BUFFER, MPI.ERR_COMM, MPI.ERR_COUNT, MPI.ERR_GROUP, MPI.ERR_OP),
    *(MPI.ERR_RANK, MPI.ERR_ROOT, MPI.ERR_TAG, MPI.ERR_TYPE),
)


def raise_mpi_error(error: MPI.Exception, name: str, comm: MPI.Comm) -> NoReturn:
    """Raise MPI's error of a collective: unchanged for invalid arguments, else DesyncError with all locations."""
    if error.Get_error_class() in ARGUMENT_ERRORS:
        raise error
    raise_desync(error, f"{name}: {error}", ranks_in_the_job(comm))


def takes_threads() -> bool:
    """Return whether several threads may call MPI at the same time."""
    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)


def _make_progress() -> None:
    """Let MPI make progress on the calls that were started."""
    if MPI.Is_initialized() and not MPI.Is_finalized():
        MPI.COMM_WORLD.Iprobe()


while_serving(_make_progress)


def ranks_in_the_job(comm: MPI.Comm) -> list[int]:
    """Return the ranks in MPI.COMM_WORLD of the members of a communicator. Issues no collective."""
    group = comm.Get_group()
    ranks: list[int] = MPI.Group.Translate_ranks(group, list(range(group.size)), MPI.COMM_WORLD.Get_group())
    return ranks
