"""Predict what synchronizing BatchNorm costs on a cluster, and recommend the ranks that should share statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..bench.job import join
from ..testing.whole_batch import random_batches
from ..testing.whole_batch.building import build_model, name_of
from .explain import Costs
from .measure import measure_alone, measure_job
from .network import Link, Network
from .predict import Prediction, Step, variants
from .report import Check, Report
from .trace import Trace, trace
from .waiting import Noise

__all__ = ["NOISE", "Check", "Link", "Prediction", "Report", "plan", "plan_by_measuring"]

NOISE = 0.002  # of the computing of a step. It is then 2 % of each of 100 parts, if their times are independent
Build = Callable[[], nn.Module] | str


def plan(
    build: Build,
    input_shape: Sequence[int],
    batch_per_rank: int,
    *,
    nodes: int,
    ranks_per_node: int,
    between: Link,
    within: Link | None = None,
    step: float | None = None,
    noise: float = NOISE,
    integers: int | None = None,
) -> Report:
    """Predict the training step of a model on a cluster, with BatchNorm synchronized over different groups of ranks.

    One forward pass in this process finds the norm layers and what they send. Unless `step` is given, some training
    steps are timed, on a GPU if there is one. See `syncnorm.planning.network` and `syncnorm.planning.waiting` for the
    model of the cost, and its sources.

    Args:
        build: a function that returns the model, or "MODULE:FUNCTION". MODULE may be the path of a file. The model
            takes one tensor.
        input_shape: of one sample.
        batch_per_rank: samples of a rank.
        nodes: of the cluster.
        ranks_per_node: of the cluster.
        between: latency and bandwidth between ranks of two nodes.
        within: the same between ranks of a node. Default: as `between`.
        step: seconds of a training step of one rank with BatchNorm, without communication. Default: measured.
        noise: the standard deviation of that time from rank to rank and step to step, over the time itself.
        integers: inputs are random integers below this number, for embeddings. Default: random normal numbers.

    Collectives: none.

    Raises:
        ValueError: an argument is not in its range, or the model has lazy parameters.
        TypeError: `build` returns no model, or the output of the model requires no gradient.
    """
    within = within or between
    _check(batch_per_rank=batch_per_rank, nodes=nodes, ranks_per_node=ranks_per_node, integers=integers, step=step)
    _check_links(within, between)
    _check_noise(noise)
    batch, found = _traced(build, input_shape, batch_per_rank, integers)
    if step is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        compute, converted = measure_alone(build, batch, device)
        where = "a GPU" if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        source = f"{_ms(compute)}, measured in this process on {where}; converted: {_ms(converted)}"
    else:
        compute = converted = step
        source = f"{_ms(step)}, as given, converted or not"
    network = Network(ranks_per_node, within, between)
    sources = {
        "computing": source,
        "noise": f"{noise:.1%} of the computing",
        "within a node": _told(within),
        "between nodes": _told(between),
    }
    costs = Costs(compute, converted, Noise(noise * compute), network, network)
    return Report(name_of(build), Step(found, batch_per_rank, costs), nodes * ranks_per_node, sources)


def plan_by_measuring(
    build: Build,
    input_shape: Sequence[int],
    batch_per_rank: int,
    *,
    nodes: int | None = None,
    ranks_per_node: int | None = None,
    between: Link | None = None,
    noise: float | None = None,
    integers: int | None = None,
) -> Report:
    """Measure on the ranks of this job what `plan` is told, and compare its predictions with measured steps.

    All ranks compute at the same time, so that what they share is in the times: cores, caches and memory.

    Args:
        build: as for `plan`.
        input_shape: as for `plan`.
        batch_per_rank: as for `plan`.
        nodes: of the cluster that the prediction is for. Default: those of this job.
        ranks_per_node: of that cluster. Default: those of this job.
        between: the link between nodes, if it should not be the one that is measured. On one node none can be measured,
            and the default is that within the node.
        noise: as for `plan`. Default: measured.
        integers: as for `plan`.

    Collectives: all ranks of the job must call this. It joins the job.

    Raises:
        ValueError: as for `plan`.
        RuntimeError: the job has one rank, or its nodes have different numbers of ranks.
    """
    _check(batch_per_rank=batch_per_rank, nodes=nodes, ranks_per_node=ranks_per_node, integers=integers)
    if between is not None:
        _check_links(between)
    if noise is not None:
        _check_noise(noise)
    job = join()
    if job.group.size == 1:
        raise RuntimeError("expected several ranks to measure on, got one: start them with torchrun or mpirun")
    batch, found = _traced(build, input_shape, batch_per_rank, integers)
    costs, timings = measure_job(build, batch, found, job)
    if noise is not None:
        costs = costs._replace(noise=Noise(noise * costs.compute))
    here, network, ranks = Step(found, batch_per_rank, costs), costs.statistics, job.group.size
    checks = [
        Check(variant.name, ranks, here.predict(variant, ranks).step, timings[variant.name])
        for variant in variants(ranks, network.ranks_per_node)
        if variant.name in timings
    ]
    nodes_here = ranks // network.ranks_per_node
    of_noise = f"{costs.noise.total / costs.compute:.1%} of the computing"
    of_link = _told(network.between) if nodes_here > 1 else "as within a node, since this job is on one"
    sources = {
        "measured on": f"{nodes_here} node{'s' * (nodes_here > 1)} with {network.ranks_per_node} ranks",
        "computing": f"{_ms(costs.compute)}, measured on all ranks; converted: {_ms(costs.converted)}",
        "noise": f"{of_noise}, {'measured' if noise is None else 'as given'}",
        "within a node": f"{_told(network.within)}, measured",
        "between nodes": of_link if between is None else f"{_told(between)}, as given",
        "sums of gradients": f"{_told(costs.gradients.within)}, measured",
    }
    ranks_per_node = ranks_per_node or network.ranks_per_node
    step = here._replace(costs=_elsewhere(costs, ranks_per_node, between))
    return Report(name_of(build), step, (nodes or nodes_here) * ranks_per_node, sources, checks)


def _traced(build: Build, shape: Sequence[int], samples: int, integers: int | None) -> tuple[torch.Tensor, Trace]:
    (batch,) = random_batches(shape, samples, 1, integers=integers)
    batch = batch.float() if batch.is_floating_point() else batch
    return batch, trace(build_model(build), batch)


def _elsewhere(costs: Costs, ranks_per_node: int, between: Link | None) -> Costs:
    """Return the costs on another cluster."""
    networks = (
        network._replace(ranks_per_node=ranks_per_node, between=between or network.between)
        for network in (costs.statistics, costs.gradients)
    )
    return Costs(*costs[:3], *networks)


def _check(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"expected {name} to be positive, got {value}")


def _check_links(*links: Link) -> None:
    for link in links:
        if not (link.latency >= 0 and link.bandwidth > 0):
            raise ValueError(f"expected a latency of 0 or more and a positive bandwidth, got {link}")


def _check_noise(noise: float) -> None:
    if not noise >= 0:
        raise ValueError(f"expected noise to be 0 or more, got {noise}")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _told(link: Link) -> str:
    gigabits = 8e-9 * link.bandwidth
    if math.isinf(gigabits):
        return f"{1e6 * link.latency:.3g} µs, whatever the size"
    return f"{1e6 * link.latency:.3g} µs, {f'{gigabits:,.0f}' if gigabits >= 100 else f'{gigabits:.3g}'} Gb/s"
