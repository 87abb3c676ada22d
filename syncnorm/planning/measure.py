"""Measure what a prediction needs: computing in one process, or computing and communication on all ranks of a job."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..bench.job import Job
from ..bench.timing import QUICK, Effort, Timing, by_turns, clock_of, wall
from ..communicators import ALONE, Communicator
from ..communicators.subgroups import new_subgroups
from ..testing.whole_batch.training import Batch
from .explain import (
    COMPUTING,
    CONVERTED,
    PARTS,
    PARTS_SUMMED,
    SUMMED,
    Costs,
    explain,
    of_slowest,
    over_ranks,
)
from .fit import fit
from .network import Link, Network, buckets, steps
from .predict import BN, GLOBAL, NODE, of_block
from .trace import Trace
from .training import TrainingStep

__all__ = ["Measured", "measure_alone", "measure_job"]

CHANNELS = (8, 64, 256, 1024, 2048)  # of the messages that are timed
STEPS = Effort(rounds=31, block=0.0, seconds=60)  # of one step each
STEPS_ALONE = Effort(rounds=11, block=0.0, seconds=60)
MESSAGES = Effort(rounds=25, block=2e-3, seconds=5)

Build = Callable[[], nn.Module] | str


class Measured(NamedTuple):
    """What was measured on the ranks of a job.

    Attributes:
        costs: of a step.
        steps: the timing of steps that communicate, by the name of their variant. The slowest rank of a round counts.
    """

    costs: Costs
    steps: Mapping[str, Timing]


def measure_alone(build: Build, batch: Batch, device: torch.device) -> tuple[float, float]:
    """Return the seconds of a step's computing in this process: with BatchNorm, and converted."""
    means = over_ranks(by_turns(_computing(build, batch, device), ALONE, STEPS_ALONE, wall(clock_of(device))))
    return means[COMPUTING], means[CONVERTED]


def measure_job(build: Build, batch: Batch, trace: Trace, job: Job) -> Measured:
    """Time computing, collectives and whole steps on all ranks of the job at once. Collective on all of them.

    Raises:
        RuntimeError: the nodes have different numbers of ranks.
    """
    node = new_subgroups("node", job.group)
    sizes = job.group.all_gather_object(node.size)
    if len(set(sizes)) > 1:
        raise RuntimeError(f"expected the same number of ranks on each node, got {sizes} on the nodes of the ranks")
    messages, gradients = trace.messages(), buckets(trace.gradient_bytes)
    of_messages = _network(_messages(job.group, job), _messages(node, job) if node.size > 1 else None, node, job)
    of_gradients = _network(_gradients(gradients, job), None, node, job)

    computing, training = _computing(build, batch, job.device), _training(build, batch, job, node)
    candidates = {**computing, **training, SUMMED: _then_sum(computing[COMPUTING], gradients, job.device)}
    if messages:
        candidates |= _parts(messages, _seconds(computing[CONVERTED], job, QUICK), job)
    samples = by_turns(candidates, job.group, STEPS, wall(clock_of(job.device)), together=True)
    costs = explain(samples, trace, of_messages, of_gradients, _shares_cores(node, job))
    return Measured(costs, {name: timing for name, timing in of_slowest(samples).items() if name in training})


def _shares_cores(node: Communicator, job: Job) -> bool:
    """Return whether ranks compute on CPUs, and a node has more of them than cores. Collective on all ranks."""
    cores = set().union(*node.all_gather_object(os.sched_getaffinity(0)))
    return any(job.group.all_gather_object(job.device.type == "cpu" and len(cores) < node.size))


def _computing(build: Build, batch: Batch, device: torch.device) -> dict[str, Callable[[], None]]:
    return {
        COMPUTING: TrainingStep(build, batch, device),
        CONVERTED: TrainingStep(build, batch, device, convert=True, process_group=ALONE),
    }


def _training(build: Build, batch: Batch, job: Job, node: Communicator) -> dict[str, Callable[[], None]]:
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


def _then_sum(step: Callable[[], None], sizes: Sequence[int], device: torch.device) -> Callable[[], None]:
    """Return a step and then the all-reduces of gradients by torch.distributed, one after another."""
    gradients = [torch.zeros(size // 4, device=device) for size in sizes]

    def run() -> None:
        step()
        for tensor in gradients:
            dist.all_reduce(tensor)

    return run


def _parts(messages: Sequence[int], step: float, job: Job) -> dict[str, Callable[[], None]]:
    """Return computing in as many parts as a step has messages, and the same with an all-reduce after each.

    Args:
        messages: their bytes. All that are sent have the mean size.
        step: seconds of computing in a step.
        job: all of its ranks compute.
    """
    a, b = torch.rand(64, 64, device=job.device), torch.rand(64, 64, device=job.device)
    out = torch.empty_like(a)
    multiply = partial(torch.mm, a, b, out=out)
    multiplications = range(max(1, round(step / len(messages) / _seconds(multiply, job, MESSAGES))))
    parts = range(len(messages))
    tensor = torch.zeros(int(statistics.mean(messages)) // 8, dtype=torch.float64, device=job.device)

    def compute() -> None:
        for _ in parts:
            for _ in multiplications:
                multiply()

    def compute_and_sum() -> None:
        for _ in parts:
            for _ in multiplications:
                multiply()
            job.group.all_reduce(tensor)

    return {PARTS: compute, PARTS_SUMMED: compute_and_sum}


def _messages(group: Communicator, job: Job) -> Link:
    """Return the latency and the bandwidth of all-reduces over a group, back to back. Other groups have theirs."""
    tensors = [torch.zeros(2 * channels + 3, dtype=torch.float64, device=job.device) for channels in CHANNELS]
    return fit({each.nbytes: _seconds(partial(group.all_reduce, each), job, MESSAGES) for each in tensors})


def _gradients(sizes: Sequence[int], job: Job) -> Link:
    """Return the latency and the bandwidth of torch.distributed's all-reduces of such sizes, back to back."""
    largest = max([*sizes, 4096])
    tensors = [torch.zeros(largest // 4 // part, device=job.device) for part in (4, 2, 1)]
    return fit({each.nbytes: _seconds(partial(dist.all_reduce, each), job, MESSAGES) for each in tensors})


def _network(over_all: Link, of_node: Link | None, node: Communicator, job: Job) -> Network:
    """Return the network on which recursive doubling takes what all-reduces take.

    Args:
        over_all: their latency and bandwidth over all ranks.
        of_node: the same over the ranks of a node. None: links between nodes are like those within.
        node: the ranks of this node.
        job: all ranks.
    """
    nodes = job.group.size // node.size
    if of_node is None or nodes == 1:
        link = _divided(over_all, steps(job.group.size))
        return Network(node.size, link, link)
    within, between = _divided(of_node, steps(node.size)), _divided(_beyond(over_all, of_node), steps(nodes))
    return Network(node.size, within, between)


def _beyond(whole: Link, part: Link) -> Link:
    """Return what the whole takes longer than its part."""
    per_byte = max(0.0, 1 / whole.bandwidth - 1 / part.bandwidth)
    return Link(max(0.0, whole.latency - part.latency), 1 / per_byte if per_byte else math.inf)


def _divided(link: Link, count: int) -> Link:
    return Link(link.latency / count, link.bandwidth * count)


def _seconds(run: Callable[[], object], job: Job, effort: Effort) -> float:
    """Return the seconds of a call on all ranks of the job."""
    return of_slowest(by_turns({"": run}, job.group, effort, wall(clock_of(job.device))))[""].median
