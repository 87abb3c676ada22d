"""Forked children of ranks, which leave alone what their parents hold of the job."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launchers import launch

FORKED = Path(__file__).parent / "forked.py"


def check(ends, *jobs):
    said = "{'expected a collective in the process that joined the job'}"
    for job in jobs:
        assert job.returncode == 0, job.stderr
        assert "ValueError: in a child of rank" in job.stderr
        assert "ended with" not in job.stderr  # which would be a rank's report
        assert "abort" not in job.stderr
    lines = sorted(line for job in jobs for line in job.stdout.splitlines())
    assert lines == [f"rank {rank}: {ends} {said} 0" for rank in range(2)]


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
