"""Hold a distributed model against one process that trains it on the whole batch, layer by layer."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...communicators import communicator
from ...convert import convert_sync_batchnorm, revert_sync_batchnorm
from ..ranks import run_ranks
from .building import name_of
from .comparison import Comparison, Found
from .inputs import random_batches
from .reference import Reference
from .report import Report, Run
from .training import Plan, build, call, part, shards, size, train
from .traits import traits_of

__all__ = ["SPLITS", "Report", "Run", "assert_matches_whole_batch", "random_batches", "verify"]

SPLITS = ("even", "random", "empty")
Batch = Any


def verify(
    build_model: Callable[[], nn.Module] | str,
    batches: Batch | Sequence[Batch],
    world_sizes: Iterable[int] = (2,),
    *,
    splits: Iterable[str] = ("even",),
    dtypes: Iterable[torch.dtype] = (torch.float64, torch.float32),
    backend: str = "gloo",
    convert: bool = True,
    learning_rate: float = 0.05,
    seed: int = 0,
    timeout: float = 60,
) -> Report:
    """Train a model on several ranks and in one process on the whole batch, and compare them layer by layer.

    One process trains the model as it is built, in float64. Layers of this package are reverted there. Each rank trains
    it on its shard of each batch, converted by `syncnorm.convert_sync_batchnorm`, with gradients summed over the
    ranks. The loss is a random linear function of the outputs, so that its gradient tells every value of them. Dropout
    is switched off. Compared are the first tensor of each layer's output, its buffers after the forward pass, and the
    gradients of its parameters. The unit is the tolerance: 1e-8 of the largest value of the layer in float64, and 1e-2
    in float32.

    Args:
        build_model: a function that returns the model: one that can be imported, as for `run_ranks`, or
            "MODULE:FUNCTION". MODULE may be the path of a file.
        batches: the whole batches of the steps, or the whole batch of one step. A batch is a tensor, a tuple of
            positional arguments or a dict of keyword arguments of the model. The first axis of each tensor is that of
            the samples.
        world_sizes: numbers of ranks to try.
        splits: how the samples are dealt out: "even", "random" (any sizes) and "empty" (one rank has none).
        dtypes: of parameters and floating-point inputs on the ranks: torch.float64 and torch.float32.
        backend: as for `run_ranks`. With "nccl" the ranks train on CUDA devices.
        convert: False leaves the model as it is built, which holds other layers to the same measure.
        learning_rate: of the gradient descent between the steps.
        seed: of weights, upstream gradients and random splits.
        timeout: seconds for each training. After one that fails with an error, no other is tried.

    Raises:
        ValueError: a batch has tensors with different numbers of samples, or a split is unknown.
        RuntimeError: the backend is "nccl", and there is no CUDA device.
    """
    if backend == "nccl" and not torch.cuda.is_available():
        raise RuntimeError('expected a CUDA device for backend="nccl", found none')
    if isinstance(batches, Tensor | dict | tuple):
        batches = [batches]
    splits = tuple(splits)
    for split in splits:
        if split not in SPLITS:
            raise ValueError(f"expected a split of {', '.join(SPLITS)}, got {split!r}")
    plan = Plan(build_model, tuple(batches), learning_rate, seed)
    for batch in plan.batches:
        size(batch)
    with tempfile.TemporaryDirectory(prefix="syncnorm-verify-") as name:
        path = Path(name) / "record"
        (traits,) = run_ranks(_alone, 1, plan, path, timeout=timeout)
        runs, device = [], "cuda" if backend == "nccl" else "cpu"
        for world_size, split, dtype in itertools.product(world_sizes, splits, dtypes):
            ranges = shards(plan, world_size, split)
            runs.append(Run(world_size, split, dtype, ranges))
            arguments = plan, path, dtype, device, ranges, convert
            try:
                found = run_ranks(_on_rank, world_size, *arguments, backend=backend, timeout=timeout)
            except Exception as error:
                runs[-1].fail(error)
                break  # the others would wait as long
            runs[-1].take(found, traits)
    return Report(name_of(build_model), backend, runs, seed, convert)


def assert_matches_whole_batch(
    build_model: Callable[[], nn.Module] | str, batch: Batch | Sequence[Batch], world_size: int, **options: Any
) -> None:
    """Raise AssertionError unless a model trains on several ranks as one process does on the whole batch.

    The message names the first layer that departs, and why. Arguments are those of `verify`, with one `world_size`. So
    the BatchNorm layers are converted first, unless convert=False.
    """
    report = verify(build_model, batch, [world_size], **options)
    if not report.passed:
        raise AssertionError(report.summary())


def _alone(plan: Plan, path: Path) -> dict[str, str]:
    """Train in one process, write the record, and return the traits of the layers."""
    model, probed = (revert_sync_batchnorm(build(plan, torch.float64)) for _ in range(2))
    whole = [(0, size(batch)) for batch in plan.batches]
    reference = Reference(model, plan.seed)
    train(model, plan, torch.float64, "cpu", whole, reference, lambda tensor: tensor)
    torch.save(reference.record, path)
    first = part(plan.batches[0], whole[0], torch.float64)
    return traits_of(probed, lambda: call(probed, first), whole[0][1])


def _on_rank(plan: Plan, path: Path, dtype: torch.dtype, device: str, ranges: Any, convert: bool) -> Found:
    group = communicator()
    model = build(plan, dtype, device)
    if convert:
        model = convert_sync_batchnorm(model)
    comparison = Comparison(model, torch.load(path, mmap=True), dtype)
    train(model, plan, dtype, device, ranges[group.rank], comparison, group.all_reduce)
    return comparison.found
