"""Forked children of ranks, which leave alone what their parents hold of the job."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from forks import FORKED, check
from launchers import launch


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_children_end_and_ranks_train_on(launcher):
    check([3, 1, 0, 4], launch(launcher, 2, FORKED, "raise SystemExit"))


def test_children_where_rank_0_serves_the_store():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(launch, "alone", 1, FORKED, **meet, RANK=str(rank)) for rank in range(2)]
    check([3, 1, 0], *(job.result() for job in jobs))
