"""Measure what a prediction needs: computing in one process, or computing and communication on all ranks of the job.

Collectives are measured twice. Back to back, over a range of message sizes: that gives the latency and the bandwidth.
And with computing in between, as in a step. What an all-reduce takes longer there is the wait for the slowest rank. If
ranks share cores it may also take less, because some ranks compute while others wait.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..bench.job import Job
from ..bench.timing import Effort, by_turns, clock_of, wall
from ..communicators import ALONE, Communicator
from ..communicators.subgroups import new_subgroups
from ..testing.whole_batch.training import Batch
from .fit import fit
from .network import Link, Network, buckets, steps
from .predict import BN, GLOBAL, NODE, of_block
from .trace import Trace
from .training import TrainingStep
from .waiting import expected_maximum

__all__ = ["Measured", "measure", "measure_alone"]

CHANNELS = (8, 64, 256, 1024, 2048)  # of the messages that are timed
STEPS = Effort(rounds=15, block=0.0, seconds=60)  # one step each
MESSAGES = Effort(rounds=25, block=2e-3, seconds=20)
PARTS = Effort(rounds=15, block=0.0, seconds=20)
MOST_PARTS = 40  # of computing, with an all-reduce after each
LOCAL, CONVERTED = "computing", "computing, converted"  # without communication

Build = Callable[[], nn.Module] | str


class Measured(NamedTuple):
    """What was measured. Times are in seconds.

    Attributes:
        compute: a step with BatchNorm, without communication: the mean over the ranks of their medians.
        converted: the same for the converted model in a group of one rank.
        sigma: the standard deviation of a step's computing. None if one process has measured.
        statistics: the network of the norms' messages, if several ranks have measured.
        gradients: the network of the gradients, as `statistics`.
        steps: of variants that communicate, by name: the median over the rounds of the slowest rank.
    """

    compute: float
    converted: float
    sigma: float | None = None
    statistics: Network | None = None
    gradients: Network | None = None
    steps: Mapping[str, float] = {}


def measure_alone(build: Build, batch: Batch, device: torch.device) -> Measured:
    """Time the computing of a step in this process."""
    own = _computing(build, batch, device)
    median = _means(by_turns(own, ALONE, STEPS, wall(clock_of(device))))
    return Measured(median[LOCAL], median[CONVERTED])


def measure(build: Build, batch: Batch, trace: Trace, job: Job) -> Measured:
    """Time computing, collectives and whole steps on all ranks of the job at once. Collective on all of them."""
    group, device = job
    node = new_subgroups("node", group)
    sizes = group.all_gather_object(node.size)
    if len(set(sizes)) > 1:
        raise RuntimeError(f"expected the same number of ranks on each node, got {sizes} on the nodes of the ranks")
    samples = by_turns(
        {**_computing(build, batch, device), **_training(build, batch, job, node)},
        *(group, STEPS, wall(clock_of(device))),
        together=True,
    )
    computing, slowest = _means(samples), _slowest(samples)
    network, sigma = _in_a_step(_messages(job, node), trace, computing[CONVERTED], job)
    return Measured(
        computing[LOCAL],
        computing[CONVERTED],
        sigma,
        network,
        _gradients(trace.gradient_bytes, node.size, job),
        {name: slowest[name] for name in slowest if name not in (LOCAL, CONVERTED)},
    )


def _computing(build: Build, batch: Batch, device: torch.device) -> dict[str, Callable[[], object]]:
    return {
        LOCAL: TrainingStep(build, batch, device),
        CONVERTED: TrainingStep(build, batch, device, convert=True, process_group=ALONE),
    }


def _training(build: Build, batch: Batch, job: Job, node: Communicator) -> dict[str, Callable[[], object]]:
    """Return steps of the variants that can be measured on this job, by name."""
    groups: dict[str, Communicator | None] = {BN: None, GLOBAL: job.group}
    if job.group.size > 2 and node.size != 2:
        groups[of_block(2).name] = new_subgroups(2, job.group)
    if 1 < node.size < job.group.size:
        groups[NODE] = node
    return {
        name: TrainingStep(build, batch, job.device, convert=group is not None, process_group=group, sum_gradients=True)
        for name, group in groups.items()
    }


def _messages(job: Job, node: Communicator) -> Network:
    """Return the network on which recursive doubling takes what all-reduces take back to back."""
    over_all = _all_reduces(job.group, job)
    if node.size == job.group.size:
        within = _divided(over_all, steps(node.size))
        return Network(node.size, within, within, ("doubling",))
    nodes = job.group.size // node.size
    if node.size == 1:
        between = _divided(over_all, steps(nodes))
        return Network(1, between, between, ("doubling",))
    of_node = _all_reduces(node, job)
    within, between = _divided(of_node, steps(node.size)), _divided(_beyond(over_all, of_node), steps(nodes))
    return Network(node.size, within, between, ("doubling",))


def _all_reduces(group: Communicator, job: Job) -> Link:
    """Return the latency and the bandwidth of all-reduces over a group, while other groups have theirs."""
    seconds = {}
    for channels in CHANNELS:
        tensor = torch.zeros(2 * channels + 3, dtype=torch.float64, device=job.device)
        run = partial(group.all_reduce, tensor)
        seconds[tensor.nbytes] = _seconds(run, job, MESSAGES)
    return fit(seconds)


def _beyond(whole: Link, part: Link) -> Link:
    """Return what the whole takes longer than its part."""
    per_byte = max(0.0, 1 / whole.bandwidth - 1 / part.bandwidth)
    return Link(max(0.0, whole.latency - part.latency), 1 / per_byte if per_byte else math.inf)


def _divided(link: Link, count: int) -> Link:
    return Link(link.latency / count, link.bandwidth * count)


def _in_a_step(network: Network, trace: Trace, compute: float, job: Job) -> tuple[Network, float]:
    """Return the network and the σ that explain what an all-reduce takes between two parts of computing."""
    messages = trace.messages()
    if not messages:
        return network, 0.0
    nbytes = int(statistics.mean(messages))
    part = _part(compute / len(messages), job)
    count = min(len(messages), MOST_PARTS)
    tensor = torch.zeros(nbytes // 8, dtype=torch.float64, device=job.device)

    def alone() -> None:
        for _ in range(count):
            part()

    def with_sums() -> None:
        for _ in range(count):
            part()
            job.group.all_reduce(tensor)

    samples = by_turns({"alone": alone, "sums": with_sums}, job.group, PARTS, wall(clock_of(job.device)), together=True)
    mean, slowest = _means(samples)["alone"], _slowest(samples)["sums"]
    found, alone_takes = (slowest - mean) / count, network.all_reduce(nbytes, job.group.size)
    if found >= alone_takes:
        of_part = (found - alone_takes) / expected_maximum(job.group.size)
        return network, of_part * math.sqrt(len(messages))
    share = max(0.0, found) / alone_takes
    return network._replace(within=_scaled(network.within, share), between=_scaled(network.between, share)), 0.0


def _scaled(link: Link, factor: float) -> Link:
    return Link(link.latency * factor, link.bandwidth / factor if factor else math.inf)


def _part(seconds: float, job: Job) -> Callable[[], None]:
    """Return a function that computes for about so many seconds while all ranks do. The same on all of them."""
    a, b = torch.rand(64, 64, device=job.device), torch.rand(64, 64, device=job.device)
    out = torch.empty_like(a)

    def multiply() -> Tensor:
        return torch.mm(a, b, out=out)

    times = max(1, round(seconds / _seconds(multiply, job, MESSAGES)))

    def part() -> None:
        for _ in range(times):
            multiply()

    return part


def _gradients(nbytes: int, on_node: int, job: Job) -> Network:
    """Return the network on which rings take what torch.distributed took for buckets of gradients."""
    ranks, largest = job.group.size, max([*buckets(nbytes), 4096])
    seconds = {}
    for size in (largest // 4, largest // 2, largest):
        tensor = torch.zeros(size // 4, device=job.device)
        seconds[size] = _seconds(partial(dist.all_reduce, tensor), job, MESSAGES)
    found = fit(seconds)
    link = Link(found.latency / (2 * (ranks - 1)), found.bandwidth * 2 * (ranks - 1) / ranks)
    return Network(on_node, link, link, ("ring",))


def _seconds(run: Callable[[], object], job: Job, effort: Effort) -> float:
    """Return the seconds of a call on all ranks of the job."""
    return _slowest(by_turns({"": run}, job.group, effort, wall(clock_of(job.device))))[""]


Samples = Sequence[Mapping[str, Sequence[float]]]  # by rank, candidate and round


def _means(samples: Samples) -> dict[str, float]:
    """Return the mean over the ranks of their medians."""
    return {name: statistics.mean(statistics.median(of_rank[name]) for of_rank in samples) for name in samples[0]}


def _slowest(samples: Samples) -> dict[str, float]:
    """Return the median over the rounds of the slowest rank."""
    return {
        name: statistics.median(map(max, zip(*(of_rank[name] for of_rank in samples), strict=True)))
        for name in samples[0]
    }
