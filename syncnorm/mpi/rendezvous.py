"""Rendezvous under mpirun: rank 0 opens the job's store, and MPI broadcasts its address."""

from __future__ import annotations

import os
import secrets

from ..job.launcher import RENDEZVOUS, check_world_size
from ..job.rendezvous import address_of_this_host, export, have_joined, serve
from ..job.store import LOCALHOST, free_port
from .library import MPI

__all__ = ["export_rendezvous"]


def export_rendezvous(world: MPI.Comm) -> None:
    """Set torchrun's variables unless they are set. Rank 0 opens a store on a free port and broadcasts its address.

    Raises:
        RuntimeError: the launcher started several ranks and MPI reports one, or RANK and WORLD_SIZE contradict MPI.
    """
    if os.environ.keys() >= {*RENDEZVOUS}:
        _compare_with_mpi(world)
        return
    if world.size == 1:
        check_world_size("MPI")
        if not have_joined():  # for torch.distributed's own init_process_group
            export(0, 1, 0, 1, LOCALHOST, free_port(), is_served=False)
        return
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    where = None
    if world.rank == 0:
        address = LOCALHOST if host.size == world.size else address_of_this_host()
        os.environ["SYNCNORM_JOB_ID"] = f"{secrets.token_hex(8)} of mpirun"
        where = os.environ["SYNCNORM_JOB_ID"], address, serve(address, 0)
    os.environ["SYNCNORM_JOB_ID"], address, port = world.bcast(where)
    export(world.rank, world.size, host.rank, host.size, address, port, is_served=True)
    host.Free()


def _compare_with_mpi(world: MPI.Comm) -> None:
    """Raise unless RANK and WORLD_SIZE are those of MPI."""
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if (rank, size) != (str(world.rank), str(world.size)):
        raise RuntimeError(
            f"expected one launcher, got two that contradict each other: RANK={rank}, WORLD_SIZE={size} of torchrun, "
            f"and rank {world.rank} of {world.size} of MPI. Unset RANK and WORLD_SIZE to join the ranks of MPI"
        )
