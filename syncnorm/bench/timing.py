"""Timing candidates against each other: by turns, so that what disturbs the machine disturbs all of them.

A `Sampler` takes one sample. `wall` reads a clock around the calls, `on_device` measures what the calls take on a GPU,
and `until_return` what they take on the host while the GPU is idle.
"""

from __future__ import annotations

import math
import random
import statistics
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch

from ..communicators import Communicator

__all__ = [
    "DEVICE",
    "FULL",
    "HOST",
    "NOISY",
    "QUICK",
    "WALL",
    "Budget",
    "Candidates",
    "Effort",
    "Sampler",
    "Timing",
    "by_turns",
    "clock_of",
    "interleave",
    "left_out",
    "on_device",
    "sampler_of",
    "until_return",
    "wall",
]

Candidates = Mapping[str, Callable[[], object]]
Sampler: TypeAlias = Callable[[Callable[[], object], int], float]  # (run, calls) -> seconds that the calls took


class Effort(NamedTuple):
    """How long to measure.

    Args:
        rounds: number of samples of each candidate, two or more.
        block: seconds that the calls of one sample take together, at least; one call may take longer.
        seconds: about what all rounds may take together. There are FEWEST rounds even if they take longer.
    """

    rounds: int
    block: float
    seconds: float = math.inf


FULL = Effort(rounds=101, block=5e-4)  # short: fewer blocks are hit by what else the machine does
QUICK = Effort(rounds=5, block=1e-4)  # tells whether it runs, not how fast
FEWEST = 5  # rounds that quartiles can be told from
HOST, DEVICE, WALL = "host", "device", "wall"  # times of `until_return`, of `on_device`, and of `wall`
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


def wall(clock: Callable[[], float] = time.perf_counter) -> Sampler:
    """Return a sampler that reads a clock before and after the calls."""
    return lambda run, calls: timeit.Timer(run, timer=clock).timeit(calls)


def on_device(device: torch.device) -> Sampler:
    """Return a sampler of the time between two CUDA events around the calls.

    A call before the first event keeps the device busy while the host enqueues the others. If the host is slower than
    the device, the device waits between kernels, and the time is that of the host.
    """

    def sample(run: Callable[[], object], calls: int) -> float:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            run()
            start.record()
            timeit.Timer(run).timeit(calls)  # without garbage collection
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    return sample


def until_return(device: torch.device) -> Sampler:
    """Return a sampler of the host's time: from a call until it returns, each begun when the device is idle."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else _do_nothing

    def sample(run: Callable[[], object], calls: int) -> float:
        timer, spent = timeit.Timer(run), 0.0
        for _ in range(calls):
            wait()
            spent += timer.timeit(1)
        return spent

    return sample


def sampler_of(device: torch.device) -> Sampler:
    """Return the sampler for what a candidate takes: CUDA events on a GPU, else the clock."""
    return on_device(device) if device.type == "cuda" else wall()


def _do_nothing() -> None:
    """Wait for a device that is never behind."""


def interleave(
    candidates: Candidates,
    group: Communicator,
    effort: Effort,
    sample: Sampler | None = None,
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
        sample: takes a sample. None: `wall()`.
        together: a barrier before the timed block too, for candidates that work long between their collectives.
    """
    by_rank = by_turns(candidates, group, effort, sample, together=together)
    slowest = {name: [max(r) for r in zip(*(of[name] for of in by_rank), strict=True)] for name in candidates}
    return {name: Timing.of(of) for name, of in slowest.items()}


def by_turns(
    candidates: Candidates,
    group: Communicator,
    effort: Effort,
    sample: Sampler | None = None,
    *,
    together: bool = False,
) -> list[dict[str, list[float]]]:
    """Return the seconds of one call of each candidate, by rank, candidate and round.

    Arguments and collectives are those of `interleave`.
    """
    sample = sample or wall()
    blocks = {name: _block(effort.block, run, sample, group) for name, run in candidates.items()}
    a_round = 2 * sum(seconds for _, seconds in blocks.values())
    rounds = effort.rounds
    if a_round * rounds > effort.seconds:
        rounds = min(rounds, max(FEWEST, int(effort.seconds / a_round)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order, draw = list(candidates), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            run, calls = candidates[name], blocks[name][0]
            group.barrier()
            sample(run, calls)
            if together:
                group.barrier()
            samples[name].append(sample(run, calls) / calls)
    return group.all_gather_object(samples)


def _block(block: float, run: Callable[[], object], sample: Sampler, group: Communicator) -> tuple[int, float]:
    """Return a number of calls that fill the block on some rank, and their seconds. Warms up what it calls."""
    sample(run, 1)
    calls = 1
    while (seconds := max(group.all_gather_object(sample(run, calls)))) < block:
        calls *= 2
    return calls, seconds


class Budget:
    """The seconds that a benchmark has for its parts. All ranks of the group are told the same.

    Args:
        seconds: from now on. `math.inf` is no limit, and then there is no collective.
        group: the ranks that measure together.
    """

    def __init__(self, seconds: float, group: Communicator):
        self.end, self.group = time.monotonic() + seconds, group

    def left(self) -> float:
        """Return the seconds that rank 0 has left, at least 0. Collective on all ranks of the group."""
        if math.isinf(self.end):
            return math.inf
        left: float = self.group.all_gather_object(self.end - time.monotonic())[0]
        return max(0.0, left)

    def share(self, parts: int) -> float:
        """Return an equal share of the seconds left for each of so many parts. Collective as `left`."""
        return self.left() / parts


def left_out(all_rows: int, kept: int) -> str:
    """Return a sentence on disturbed rows that are not shown, or nothing if there are none."""
    if all_rows == kept:
        return ""
    return f"Left out as disturbed: {all_rows - kept} of {all_rows} (upper quartile above {NOISY:g} times the lower)."
