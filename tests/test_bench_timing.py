"""bench/timing.py: how candidates are timed against each other."""

import math
import time
from contextlib import nullcontext

import pytest
import torch
from benchmarks import Stopwatch

import syncnorm
from syncnorm.bench import timing
from syncnorm.bench.timing import Effort, Timing
from syncnorm.communicators import LocalCommunicator
from syncnorm.testing import run_ranks


def time_candidates(clock, effort, group=None, **costs):
    candidates = {name: clock.candidate(name, cost) for name, cost in costs.items()}
    return timing.interleave(candidates, group or LocalCommunicator(), effort, timing.wall(clock))


def test_a_timing_is_the_median_and_the_quartiles():
    assert Timing.of([9.0, 1.0, 3.0, 2.0, 100.0]) == Timing(median=3.0, low=2.0, high=9.0)


def test_candidates_take_what_they_take():
    timings = time_candidates(Stopwatch(), Effort(rounds=5, block=0.0), quick=0.25, slow=3.0)
    assert timings == {"quick": Timing(0.25, 0.25, 0.25), "slow": Timing(3.0, 3.0, 3.0)}


def test_ranks_start_the_timed_block_together():
    clock, group = Stopwatch(), LocalCommunicator()
    group.barrier = lambda: clock.calls.append("barrier")
    candidates = {"a": clock.candidate("a", 1.0)}
    timing.interleave(candidates, group, Effort(rounds=2, block=0.0), timing.wall(clock), together=True)
    assert clock.calls == ["a", "a", *["barrier", "a"] * 4]
    assert timing.clock_of(torch.device("cpu")) is timing.time.perf_counter


def test_a_sample_is_as_many_calls_as_fill_a_block():
    clock = Stopwatch()
    timings = time_candidates(clock, Effort(rounds=2, block=8.0), quick=0.5)
    assert timings["quick"].median == 0.5
    assert len(clock.calls) == 1 + (1 + 2 + 4 + 8 + 16) + 2 * (16 + 16)  # warm up, double, measure
    clock = Stopwatch()
    time_candidates(clock, Effort(rounds=2, block=8.0), slow=16.0)
    assert len(clock.calls) == 1 + 1 + 2 * (1 + 1)


def test_the_spread_is_that_of_the_rounds():
    costs = iter([1.0, 1.0, *(cost for sample in (5.0, 1.0, 2.0, 4.0, 3.0) for cost in (0.0, sample))])
    timings = time_candidates(Stopwatch(), Effort(rounds=5, block=0.0), only=lambda _: next(costs))
    assert timings["only"] == Timing(median=3.0, low=2.0, high=4.0)


def test_every_round_times_every_candidate_in_an_order_of_its_own():
    clock = Stopwatch()
    time_candidates(clock, Effort(rounds=20, block=0.0), a=1.0, b=1.0, c=1.0)
    timed = clock.calls[-2 * 3 * 20 :: 2]
    rounds = ["".join(timed[i : i + 3]) for i in range(0, 60, 3)]
    assert {"".join(sorted(order)) for order in rounds} == {"abc"}
    assert set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"}


@pytest.mark.parametrize(("seconds", "rounds"), [(1000.0, 50), (60.0, 10), (0.0, timing.FEWEST)])
def test_rounds_fit_the_seconds_there_are(seconds, rounds):
    """A round is a block that is not timed and one that is, of each candidate: 6 seconds."""
    clock = Stopwatch()
    time_candidates(clock, Effort(rounds=50, block=0.0, seconds=seconds), a=1.0, b=2.0)
    assert len(clock.calls) == 2 * 2 + 2 * 2 * rounds


def test_few_rounds_are_not_made_more():
    clock = Stopwatch()
    time_candidates(clock, Effort(rounds=2, block=0.0, seconds=0.0), a=1.0)
    assert len(clock.calls) == 2 + 2 * 2


class Event:
    """A CUDA event on a device that a Stopwatch stands for."""

    def __init__(self, clock):
        self.clock = clock

    def record(self):
        self.clock.calls.append("record")
        self.at = self.clock()

    def synchronize(self):
        self.clock.calls.append("synchronize")

    def elapsed_time(self, end):
        return 1000 * (end.at - self.at)


def test_the_time_on_a_device_is_that_between_two_events_while_it_is_busy(monkeypatch):
    clock = Stopwatch()
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(clock))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert timing.sampler_of(torch.device("cuda"))(clock.candidate("a", 0.5), 3) == 1.5
    assert clock.calls == ["a", "record", "a", "a", "a", "record", "synchronize"]


def test_the_time_on_the_host_begins_with_an_idle_device(monkeypatch):
    slept, calls = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: (calls.append("synchronize"), time.sleep(0.02)))

    def run():
        calls.append("run")
        slept.append(time.perf_counter())
        time.sleep(0.001)
        slept[-1] = time.perf_counter() - slept[-1]

    spent = timing.until_return(torch.device("cuda", 0))(run, 3)
    assert calls == ["synchronize", "run"] * 3
    assert sum(slept) <= spent < sum(slept) + 0.02
    assert timing.until_return(torch.device("cpu"))(run, 1) > 0
    assert calls == [*["synchronize", "run"] * 3, "run"]


def test_a_budget_is_shared_out_and_used_up(monkeypatch):
    clock = Stopwatch()
    monkeypatch.setattr(timing.time, "monotonic", clock)
    budget = timing.Budget(12.0, LocalCommunicator())
    assert (budget.left(), budget.share(4)) == (12.0, 3.0)
    clock.now = 10.0
    assert budget.share(4) == 0.5
    clock.now = 13.0
    assert budget.share(4) == 0.0
    assert timing.Budget(math.inf, None).share(4) == math.inf  # without a collective


def slower_on_each_rank():
    clock, group = Stopwatch(), syncnorm.communicator()
    timings = time_candidates(clock, Effort(rounds=3, block=4.0), group, a=1.0 + group.rank, b=0.5)
    return timings, clock.calls


def test_the_slowest_rank_counts_and_all_call_in_lockstep():
    results = run_ranks(slower_on_each_rank, 2)
    assert results[0] == results[1]
    assert results[0][0] == {"a": Timing(2.0, 2.0, 2.0), "b": Timing(0.5, 0.5, 0.5)}


def left_on_each_rank():
    group = syncnorm.communicator()
    return timing.Budget(100.0 + 1000 * group.rank, group).left()


def test_all_ranks_have_the_time_of_rank_0():
    first, second = run_ranks(left_on_each_rank, 2)
    assert first == second <= 100.0
