"""What a layer or a step may cost, as ratios of times within one run. A ratio above its limit misses its target.

In their words `one` is the layer with each rank a group of one, `all` the layer synchronized over all ranks, and
`all-reduces` are two bare ones, of what forward and backward send. One after the other they meet ranks and threads that
are awake. `In place`, between the copies of the copy baseline, they cost what a layer has to pay for them: what they
add to the copy baseline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from .cases import LARGE, SMALL, TINY, Case
from .timing import Timing

__all__ = [
    "ADD_RELU",
    "ALL",
    "ALL_REDUCES",
    "ALL_REDUCES_BETWEEN",
    "ALONE",
    "AUTOGRAD",
    "COMPILED",
    "COPY",
    "GRAPH",
    "MODULE",
    "OVER_COPY",
    "RELU",
    "REPRODUCIBLE",
    "TORCH",
    "TORCH_SYNC",
    "WORDS",
    "Verdict",
    "of_collectives",
    "verdicts",
]

COPY = "copy baseline"
AUTOGRAD = "copy baseline in autograd"  # called through an autograd.Function, as a layer is
TORCH = "F.batch_norm"  # unsynchronized
MODULE = "nn.BatchNorm2d"
TORCH_SYNC = "torch.nn.SyncBatchNorm"
ALL = "syncnorm"  # all ranks
ALONE = "syncnorm per rank"  # each rank a group of one
RELU = f"{ALONE}, relu"
ADD_RELU = f"{ALONE}, add, relu"
REPRODUCIBLE = f"{ALONE}, reproducible"
GRAPH = f"{ALONE}, CUDA graph"
COMPILED = f"{ALONE}, compiled"  # torch.compile of the module
ALL_REDUCES = "two all-reduces"  # bare ones, of what forward and backward send
ALL_REDUCES_BETWEEN = "copy baseline with two all-reduces"  # the same ones, where a layer has them
OVER_COPY = "one / copy"  # the target that the figure shows
ON_CPU = {LARGE: 1.1, SMALL: 1.4}  # float32, over the copy baseline
ON_GPU = 1.25
HOST_ON_GPU = 0.5  # of the host's time that torch.nn.SyncBatchNorm takes
COLLECTIVES_ON_CPU = 0.1  # of a training step

WORDS = "targets (one: each rank alone; all: synchronized; all-reduces: two bare ones, in place: between passes)"


class Verdict(NamedTuple):
    """A target and what was measured: `value`, a ratio of times, is to be at most `limit`."""

    target: str
    value: float
    limit: float
    noisy: bool

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.value <= self.limit

    def numbers(self) -> dict[str, Any]:
        """Return the verdict as it is written to JSON."""
        return {**self._asdict(), "met": self.met}

    def cells(self) -> list[str]:
        """Return the verdict as it is printed."""
        verdict = "met" if self.met else "MISSED"
        return [self.target, f"{self.value:.2f}", f"<= {self.limit:.3g}", verdict + ", noisy" * self.noisy]

    def cell(self) -> str:
        """Return the same in one cell."""
        _, value, limit, verdict = self.cells()
        return f"{value} ({limit})" if self.met else f"{value} ({limit}: {verdict})"


def verdicts(case: Case, timings: Mapping[str, Timing], device: torch.device) -> Iterator[Verdict]:
    """Yield the targets of a case, each with what was measured.

    Args:
        case: what was timed; the limits depend on it.
        timings: by candidate; of several ranks, of a GPU, those of `ALL`, `TORCH_SYNC` too. A target is left out if one
            of its candidates is. On a GPU, those of a TINY case are the host's.
        device: on which it was.
    """

    def time(name: str) -> float:
        return timings[name].median

    def verdict(target: str, value: float, limit: float, *names: str) -> Verdict:
        return Verdict(target, value, limit, any(timings[name].noisy for name in names))

    if ALONE not in timings:
        return
    one = time(ALONE)
    if case.kind == TINY and device.type == "cuda":
        if TORCH_SYNC in timings:
            value = one / time(TORCH_SYNC)
            yield verdict("host time, one / torch.nn.SyncBatchNorm", value, HOST_ON_GPU, ALONE, TORCH_SYNC)
        return
    if case.kind == TINY:
        yield verdict("one / nn.BatchNorm2d", one / time(MODULE), 1.5, ALONE, MODULE)
        return
    if device.type == "cuda":
        yield verdict(OVER_COPY, one / time(COPY), ON_GPU, ALONE, COPY)
    elif case.dtype == torch.float32:
        yield verdict(OVER_COPY, one / time(COPY), ON_CPU[case.kind], ALONE, COPY)
    if ALL in timings:
        in_place = max(time(ALL_REDUCES), time(ALL_REDUCES_BETWEEN) - time(COPY))
        ideal = one + 1.15 * time(ALL_REDUCES)
        yield verdict("all / (one + 1.15 all-reduces)", time(ALL) / ideal, 1.0, ALL, ALONE, ALL_REDUCES)
        possible = time(ALL) / (one + 1.15 * in_place)
        yield verdict("all / (one + 1.15 all-reduces in place)", possible, 1.0, ALL, ALONE, ALL_REDUCES_BETWEEN)
    if device.type == "cpu":
        limit = 1.0 if case.kind == LARGE else 1 / 1.5
        if ALL in timings:
            less = (time(ALL) - in_place) / time(TORCH)
            yield verdict("(all - all-reduces in place) / F.batch_norm", less, limit, ALL, ALL_REDUCES_BETWEEN, TORCH)
        else:
            yield verdict("one / F.batch_norm", one / time(TORCH), limit, ALONE, TORCH)
    if TORCH_SYNC in timings:
        synchronized = ALL if ALL in timings else ALONE
        value = time(synchronized) / time(TORCH_SYNC)
        yield verdict("all / torch.nn.SyncBatchNorm", value, 1 / 1.5, synchronized, TORCH_SYNC)
    if REPRODUCIBLE in timings and case.kind == LARGE and device.type == "cpu":
        yield verdict("one, reproducible / one", time(REPRODUCIBLE) / one, 2.0, REPRODUCIBLE, ALONE)
    for target, name in (("one, relu / one", RELU), ("one, add, relu / one", ADD_RELU)):
        if name in timings:
            yield verdict(target, time(name) / one, 1.05, name, ALONE)


def of_collectives(share: float, calls: float, device: torch.device, noisy: bool) -> Verdict | None:
    """Return the target of the norms' collectives in a training step, if there is one: of several ranks on CPUs.

    Args:
        share: of the step that a rank spends in them.
        calls: how many there are in a step. A process alone has none, and neither has plain BatchNorm.
        device: of the model.
        noisy: whether the machine had other things to do.
    """
    if device.type != "cpu" or not calls:
        return None
    return Verdict("norms' collectives / step", share, COLLECTIVES_ON_CPU, noisy)
