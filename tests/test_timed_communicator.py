"""`testing.TimedCommunicator`: what it counts, and how it adds up times."""

import pytest
import torch

from syncnorm.communicators import LocalCommunicator
from syncnorm.testing import Call, TimedCommunicator, run_ranks

WAIT = 0.2  # seconds by which one rank is late


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock by one that stands still unless the test moves it."""
    now = [100.0]
    monkeypatch.setattr("syncnorm.testing.timed.time.perf_counter", lambda: now[0])
    return now


class Slow(LocalCommunicator):
    """A communicator whose all-reduces take 3 s of the clock."""

    def __init__(self, clock):
        self.clock = clock

    def all_reduce(self, tensor):
        self.clock[0] += 3
        return super().all_reduce(tensor)


def test_times_are_those_of_the_all_reduces_alone(clock):
    timed = TimedCommunicator(Slow(clock))
    for _ in range(2):
        clock[0] += 10  # computing
        timed.all_reduce(torch.ones(5, dtype=torch.float64))
    timed.barrier()
    assert timed.seconds() == 6
    assert timed.calls == [Call("all_reduce", 40), Call("all_reduce", 40), Call("barrier", 0)]
    timed.clear()
    assert (timed.seconds(), timed.calls) == (0, [])


def test_the_result_is_that_of_the_communicator_below():
    tensor = torch.arange(3.0)
    assert TimedCommunicator(LocalCommunicator()).all_reduce(tensor) is tensor


def test_a_collective_that_is_issued_elsewhere_is_timed_until_it_completes(clock):
    timed = TimedCommunicator(LocalCommunicator())
    stop = timed.start("all_reduce", torch.ones(2))
    assert (timed.calls, timed.seconds()) == ([Call("all_reduce", 8)], 0)
    clock[0] += 1.5
    stop()
    assert timed.seconds() == 1.5


def all_reduce_with_a_late_rank():
    import time

    timed = TimedCommunicator()
    timed.barrier()
    if timed.rank == 1:
        time.sleep(WAIT)
    total = timed.all_reduce(torch.ones(1)).item()
    return total, timed.seconds()


def test_the_wait_for_a_late_rank_counts():
    (first, waited), (second, _) = run_ranks(all_reduce_with_a_late_rank, 2)
    assert first == second == 2
    assert WAIT / 2 < waited < 10 * WAIT
