"""The `run` fixture: a function on the ranks of a real group, on Gloo (spawned processes) or MPI (under mpirun)."""

import pytest
import torch

import syncnorm
from syncnorm import communicators, testing

TIMEOUT = 60  # seconds for the ranks of one test


def run_under_mpirun(fn, world_size, *args):
    """Call fn(*args) on the first `world_size` ranks of this MPI job; return their results by rank, on all ranks."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    group = world.Split(0 if world.rank < world_size else MPI.UNDEFINED, world.rank)
    outcome = None
    if group != MPI.COMM_NULL:
        communicators.set_default(syncnorm.communicator(group))
        try:
            outcome = (fn(*args), None)
        except Exception as error:
            outcome = (None, error)
        finally:
            communicators.set_default(None)
        group.Free()
    outcomes = world.allgather(outcome)[:world_size]
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]


def run_spawned(fn, world_size, *args):
    """Call fn(*args) on `world_size` new processes on Gloo; return their results by rank."""
    return testing.run_ranks(fn, world_size, *args, timeout=TIMEOUT)


@pytest.fixture(params=["gloo", pytest.param("mpi", marks=pytest.mark.mpi)])
def run(request):
    """Return what calls `fn(*args)` on `world_size` ranks, in whose `syncnorm.communicator()` they meet."""
    return run_under_mpirun if request.param == "mpi" else run_spawned


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    """Under mpirun, leave to larger jobs what needs more ranks than this one has."""
    if not config.getoption("--with-mpi"):
        return
    from mpi4py import MPI

    def fits(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        ranks = getattr(params.get("case"), "world_size", params.get("world_size", 1))
        return ranks <= MPI.COMM_WORLD.size

    deselected = [item for item in items if not fits(item)]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if fits(item)]
