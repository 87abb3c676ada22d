"""Timing candidates against each other: by turns, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import random
import statistics
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from ..communicators import Communicator

__all__ = ["FULL", "NOISY", "QUICK", "Candidates", "Effort", "Timing", "clock_of", "interleave", "left_out"]

Candidates = Mapping[str, Callable[[], object]]


class Effort(NamedTuple):
    """How long to measure.

    Args:
        rounds: number of samples of each candidate, two or more.
        block: seconds that the calls of one sample take together, at least; one call may take longer.
    """

    rounds: int
    block: float


FULL = Effort(rounds=101, block=5e-4)  # short: fewer blocks are hit by what else the machine does
QUICK = Effort(rounds=5, block=1e-4)  # tells whether it runs, not how fast
NOISY = 1.5  # where the quartiles are this factor apart, the machine had other things to do


class Timing(NamedTuple):
    """Seconds for one call: the median of the rounds, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Return the timing of two or more samples."""
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)

    @property
    def noisy(self) -> bool:
        """Whether the machine had other things to do."""
        return self.high / self.low > NOISY

    def micros(self) -> tuple[float, float, float]:
        """Return the same in microseconds."""
        return 1e6 * self.median, 1e6 * self.low, 1e6 * self.high


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return what tells the time when the device has done all that it was given, in seconds."""
    if device.type != "cuda":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def interleave(
    candidates: Candidates,
    group: Communicator,
    effort: Effort,
    clock: Callable[[], float] = time.perf_counter,
    *,
    together: bool = False,
) -> dict[str, Timing]:
    """Return how long one call of each candidate takes. Collective on all ranks of the group.

    A round times every candidate once, in an order that is drawn anew, the same on all ranks: what ran before it
    also decides how quick a candidate is. A sample is the mean over a block of calls, after a barrier and a block
    that is not timed. Of the ranks' samples the slowest counts, round by round.

    Args:
        candidates: what to time, by name; the same names on all ranks.
        group: the ranks that run the candidates in lockstep.
        effort: how many samples of each candidate, and how long ones.
        clock: what tells the time, in seconds.
        together: a barrier before the timed block too, for candidates that work long between their collectives.
    """
    timers = {name: timeit.Timer(run, timer=clock) for name, run in candidates.items()}
    calls = {name: _calls_in(effort.block, timer, group) for name, timer in timers.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order, draw = list(candidates), random.Random(0)
    for _ in range(effort.rounds):
        draw.shuffle(order)
        for name in order:
            group.barrier()
            timers[name].timeit(calls[name])
            if together:
                group.barrier()
            samples[name].append(timers[name].timeit(calls[name]) / calls[name])
    by_rank = group.all_gather_object(samples)
    slowest = {name: [max(r) for r in zip(*(of[name] for of in by_rank), strict=True)] for name in candidates}
    return {name: Timing.of(of) for name, of in slowest.items()}


def _calls_in(block: float, timer: timeit.Timer, group: Communicator) -> int:
    """Return a number of calls that fill the block on some rank, by doubling it. Warms up what it calls."""
    timer.timeit(1)
    calls = 1
    while max(group.all_gather_object(timer.timeit(calls))) < block:
        calls *= 2
    return calls


def left_out(all_rows: int, kept: int) -> str:
    """Return a sentence on disturbed rows that are not shown, or nothing if there are none."""
    if all_rows == kept:
        return ""
    return f"Left out as disturbed: {all_rows - kept} of {all_rows} (upper quartile above {NOISY:g} times the lower)."
