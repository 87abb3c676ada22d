"""The MPI library. Importing this module imports mpi4py, which starts MPI, with the settings that it reads then."""

import os
from typing import NoReturn

from ..job.desync import raise_desync, while_serving

# Open MPI's own choice for non-blocking all-reduces takes three times as long for 25 MB
os.environ.setdefault("OMPI_MCA_coll_libnbc_iallreduce_algorithm", "3")

try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # which of them, for want of MPI, depends on how mpi4py was built
    raise RuntimeError(
        "MPI was asked for, and mpi4py with an MPI library cannot be imported: "
        "pip install 'syncnorm[mpi]', or pip install mpi4py beside the MPI of your cluster"
    ) from error

__all__ = ["MPI", "raise_of_mpi", "ranks_in_the_job"]

OF_ARGUMENTS = (  # the classes of errors that MPI finds before it communicates
    *(MPI.ERR_ARG, MPI.ERR_BUFFER, MPI.ERR_COMM, MPI.ERR_COUNT, MPI.ERR_GROUP, MPI.ERR_OP),
    *(MPI.ERR_RANK, MPI.ERR_ROOT, MPI.ERR_TAG, MPI.ERR_TYPE),
)


def raise_of_mpi(error: MPI.Exception, name: str, comm: MPI.Comm) -> NoReturn:
    """Raise what MPI reported of a collective: of its arguments as it is, else DesyncError with where its ranks are."""
    if error.Get_error_class() in OF_ARGUMENTS:
        raise error
    raise_desync(error, f"{name}: {error}", ranks_in_the_job(comm))


def _make_progress() -> None:
    """Let MPI go on with what was started."""
    if MPI.Is_initialized() and not MPI.Is_finalized():
        MPI.COMM_WORLD.Iprobe()


while_serving(_make_progress)


def ranks_in_the_job(comm: MPI.Comm) -> list[int]:
    """Return the ranks in MPI.COMM_WORLD of the members of a communicator. No collective."""
    group = comm.Get_group()
    ranks: list[int] = MPI.Group.Translate_ranks(group, list(range(group.size)), MPI.COMM_WORLD.Get_group())
    return ranks
