"""Ranks that meet in different collectives: the job ends, and says which rank is where."""

import re
import socket
import textwrap

import pytest
from launchers import launch, launch_one_by_one

HOST = socket.gethostname()
HEAD = """
    import sys, torch, torch.distributed as dist, syncnorm

    group = syncnorm.init(timeout={timeout})
    odd = group.rank == group.size - 1
    first, second = syncnorm.SyncBatchNorm(8), syncnorm.SyncBatchNorm(12)
    x, y = torch.randn(4, 8, requires_grad=True), torch.randn(4, 12)
    for _ in range(2):  # in which layers compare where the ranks are
        first(x).sum().backward()
        second(y)
    group.barrier()
"""
FAULTS = {  # and the sizes that the odd rank and the others send
    "another C": ("(second if odd else first)(y if odd else x)", 27, 19),
    "eval on one rank": ("first.train(not odd)(x)\n    second(y)", 27, 19),
    "another size outside of a layer": ("dist.all_reduce(torch.ones(25 if odd else 17).double())", 25, 17),
    "a skipped backward": ("loss = first(x).sum()\n    second(y) if odd else loss.backward()", 27, 18),
}


def check(fault, ranks, *errors):
    """Assert that each of these reports has the places of all ranks."""
    _, odd, others = FAULTS[fault]
    for error in errors:
        message = r"all_reduce of (\d+) float64(?: of call 3 of SyncBatchNorm no\. \d, called outside a model, \w+)?"
        places = re.findall(rf"ranks? ([\d, ]+) on {HOST}: .*in {message}, at .*script.py:1\d in ", error)
        assert {(int(rank), int(size)) for some, size in places for rank in some.split(", ")} == {
            *((rank, others) for rank in range(ranks - 1)),
            (ranks - 1, odd),
        }


@pytest.fixture
def script(tmp_path):
    def write(fault, timeout=20):
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(HEAD.format(timeout=timeout) + "    " + FAULTS[fault][0] + "\n"))
        return path

    return write


CASES = pytest.mark.parametrize(
    ("fault", "ranks"), [("another C", 2), ("eval on one rank", 4), ("a skipped backward", 4)]
)


@CASES
def test_every_rank_on_gloo_reports(script, fault, ranks):
    jobs = launch_one_by_one(ranks, script(fault), SYNCNORM_SHARED_MEMORY="0")
    assert all(job.returncode != 0 for job in jobs)
    assert any(job.returncode == -6 for job in jobs)  # the case that no Python error tells of
    check(fault, ranks, *(job.stderr for job in jobs))


@CASES
def test_every_rank_raises_in_shared_memory(script, fault, ranks):
    jobs = launch_one_by_one(ranks, script(fault))
    _, odd, others = FAULTS[fault]
    for rank, job in enumerate(jobs):
        assert job.returncode == 1
        assert f"DesyncError: all_reduce on rank {rank} of {ranks}: expected all ranks to sum the same" in job.stderr
        sizes = re.findall(r"^(?:\[rank\d\]:)? *rank (\d): (\d+) float64", job.stderr, re.MULTILINE)
        assert {(int(rank), int(size)) for rank, size in sizes} == {
            *((rank, others) for rank in range(ranks - 1)),
            (ranks - 1, odd),
        }
    check(fault, ranks, *(job.stderr for job in jobs))


@pytest.mark.parametrize(
    ("launcher", "fault", "ranks", "timeout"),
    [
        ("torchrun", "eval on one rank", 2, 20),
        ("mpirun", "another C", 4, 20),
        ("mpirun", "another size outside of a layer", 2, 20),
    ],
)
def test_a_launched_job_ends_with_a_report(script, launcher, fault, ranks, timeout):
    job = launch(launcher, ranks, script(fault, timeout))
    assert job.returncode != 0
    check(fault, ranks, job.stderr)
    if launcher == "mpirun":
        assert re.search(r"DesyncError: (MPI_Allreduce|all_reduce) on rank \d of \d", job.stderr)


def test_mpi_without_a_timeout_names_ranks_that_went_on(script):
    """The odd rank got a result, of which MPI says nothing there."""
    job = launch("mpirun", 2, script("another C", None))
    assert job.returncode != 0
    assert "DesyncError: MPI_Allreduce on rank 0 of 2: MPI_ERR_TRUNCATE: message truncated" in job.stderr
    layer = r"call 3 of SyncBatchNorm no\. 1, called outside a model, forward"
    place = rf"  rank 0 on {HOST}: in all_reduce of 19 float64 of {layer}, at .*script.py:1\d in <module>"
    assert re.search(place, job.stderr)
    assert f"  rank 1 on {HOST}: ended normally" in job.stderr
