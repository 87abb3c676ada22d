"""Predict what synchronizing BatchNorm costs on a cluster, and recommend the ranks that should share statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..bench.job import join
from ..job.launcher import detect_launcher
from ..testing.whole_batch import random_batches
from ..testing.whole_batch.building import build_model, name_of
from .measure import Measured, measure_alone, measure_job
from .network import Link, Network
from .predict import Step, variants
from .report import Check, Report
from .trace import Trace, trace
from .waiting import Noise

__all__ = ["NOISE", "Check", "Link", "Report", "plan", "plan_by_measuring"]

NOISE = 0.02  # of the computing time of a step: its standard deviation from rank to rank, unless told otherwise
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
        ValueError: an argument is not in its range.
        Other errors are those of the model.
    """
    within = within or between
    _check(batch_per_rank=batch_per_rank, nodes=nodes, ranks_per_node=ranks_per_node, integers=integers, step=step)
    _check_links(within, between)
    _check_noise(noise)
    batch, found = _traced(build, input_shape, batch_per_rank, integers)
    if step is None:
        device = join().device
        measured = measure_alone(build, batch, device)
        source = f"{_ms(measured.compute)}, measured in this process on {device.type}"
        source += f"; converted, on one rank: {_ms(measured.converted)}"
    else:
        measured, source = Measured(step, step), f"{_ms(step)}, as given, converted or not"
    network = Network(ranks_per_node, within, between)
    sources = {
        "computing": source,
        "noise": f"{noise:.1%} of the computing",
        "within a node": _told(within),
        "between nodes": _told(between),
    }
    needs = Step(
        found, batch_per_rank, measured.compute, measured.converted, Noise(noise * measured.compute), network, network
    )
    return Report(name_of(build), needs, nodes * ranks_per_node, sources)


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
    if detect_launcher().launcher == "none":
        raise RuntimeError(
            "expected several ranks to measure on, got this process alone: start it under torchrun or mpirun"
        )
    _check(batch_per_rank=batch_per_rank, nodes=nodes, ranks_per_node=ranks_per_node, integers=integers)
    if between is not None:
        _check_links(between)
    if noise is not None:
        _check_noise(noise)
    job = join()
    if job.group.size == 1:
        raise RuntimeError("expected several ranks to measure on, got a job of one rank")
    batch, found = _traced(build, input_shape, batch_per_rank, integers)
    measured = measure_job(build, batch, found, job)
    here = _step(found, batch_per_rank, measured, noise)
    checks = [
        Check(variant.name, job.group.size, here.predict(variant, job.group.size).step, measured.steps[variant.name])
        for variant in variants(job.group.size, here.statistics.ranks_per_node)
        if variant.name in measured.steps
    ]
    network = here.statistics
    nodes_here = job.group.size // network.ranks_per_node
    ranks_per_node = ranks_per_node or network.ranks_per_node
    cluster = replace(
        here,
        statistics=_extended(here.statistics, ranks_per_node, between),
        gradients=_extended(here.gradients, ranks_per_node, between),
    )
    measured_between = "as within a node, since this job is on one" if nodes_here == 1 else _told(network.between)
    sources = {
        "computing": f"{_ms(here.compute)}, measured on all ranks; converted, without messages: {_ms(here.converted)}",
        "noise": f"{here.noise.total / here.compute:.1%} of the computing, "
        + ("measured" if noise is None else "as given"),
        "within a node": f"{_told(network.within)}, measured",
        "between nodes": measured_between if between is None else f"{_told(between)}, as given",
        "gradients": f"{_told(here.gradients.within)}, measured",
        "measured on": f"{nodes_here} nodes with {network.ranks_per_node} ranks each",
    }
    return Report(name_of(build), cluster, (nodes or nodes_here) * ranks_per_node, sources, checks)


def _traced(build: Build, shape: Sequence[int], samples: int, integers: int | None) -> tuple[torch.Tensor, Trace]:
    (batch,) = random_batches(shape, samples, 1, integers=integers)
    batch = batch.float() if batch.is_floating_point() else batch
    return batch, trace(build_model(build), batch)


def _step(found: Trace, samples: int, measured: Measured, noise: float | None) -> Step:
    assert measured.noise is not None  # several ranks have measured
    assert measured.statistics is not None
    assert measured.gradients is not None
    varies = measured.noise if noise is None else Noise(noise * measured.compute)
    return Step(found, samples, measured.compute, measured.converted, varies, measured.statistics, measured.gradients)


def _extended(network: Network, ranks_per_node: int, between: Link | None) -> Network:
    """Return the network of the cluster that the prediction is for."""
    return network._replace(ranks_per_node=ranks_per_node, between=between or network.between)


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
    return f"{1e6 * link.latency:.3g} µs + {8e-9 * link.bandwidth:.3g} Gb/s"
