"""Recompute the running statistics of a model as those of a whole dataset."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DistributedDataParallel

from . import arguments
from .communicators import Communicator, ProcessGroupLike
from .join import join
from .kernels import RawMoments, halves
from .kernels.reference import or_one
from .moments import Moments
from .statistics import Layer, check_same_layers, layers_by_group

__all__ = ["recompute_running_stats"]


@torch.no_grad()
def recompute_running_stats(
    model: nn.Module,
    batches: Iterable[Any],
    process_group: ProcessGroupLike = None,
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
    progress: bool = False,
) -> None:
    """Set the running statistics to the mean and variance of all values that the layers receive, on all ranks together.

        running_mean = Σ x / n        running_var = Σ (x - running_mean)² / (n - 1)

    over the n values per channel of all batches of all ranks. The moving average of a training instead weights the
    last batches most, which were normalized by layers that have changed since. Merging is exact: every value has the
    same weight, however many batches a rank has and however large they are.

    It calls the model for each batch without gradients. Layers with running statistics normalize by the statistics of
    the batch meanwhile, as in training. All other modules stay in the mode that they are in: call `model.eval()` first
    to have the statistics without dropout. Parameters, modes, `num_batches_tracked` and all other buffers keep their
    values. If an exception is raised, the running statistics keep theirs, too.

    Args:
        model: with layers of this package, of torch.nn or others that have `running_mean` and `running_var`, except
            InstanceNorm. DistributedDataParallel and torch.compile around it are unwrapped first.
        batches: of this rank, on the device of the model. Ranks may have different numbers of them, or none.
        process_group: the ranks. None: each layer's own process group if it has one, else that of
            `syncnorm.communicator()`.
        forward: (model, batch) calls the model. Default: `model(batch)`, or `model(batch[0])` if the batch is a tuple
            or a list, as `torch.optim.swa_utils.update_bn` does.
        progress: show a progress bar on each rank. It needs rich: `pip install rich`.

    Collectives: those of `syncnorm.join`, and one all-gather of Python objects for each process group.

    Raises:
        ValueError: a layer has received 1 value per channel, or the model is not supported by `syncnorm.join`.
        SyncNormError: the models differ between ranks, or a rank did not come.

    Source: precise batch normalization, in Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021.
    """
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod  # type: ignore[assignment]
    groups = list(layers_by_group(model, process_group, without=(_InstanceNorm,)))
    values = {id(layer.module): _nothing(layer) for _, layers in groups for layer in layers}
    layers = [layer for _, layers in groups for layer in layers]
    with _kept(model), _collecting(layers, values), join(model):
        for batch in _shown(batches) if progress else batches:
            if forward is not None:
                forward(model, batch)
            else:
                model(batch[0] if isinstance(batch, list | tuple) else batch)
    of_groups = [_merged(group, layers, values) for group, layers in groups]
    for (_, layers), merged in zip(groups, of_groups, strict=True):
        for layer, moments in zip(layers, merged, strict=True):
            mean, squares = halves(moments)
            if moments[-1] > 0:
                layer.buffers["running_mean"].copy_(mean)
                layer.buffers["running_var"].copy_(squares / (moments[-1] - 1))


def _nothing(layer: Layer) -> RawMoments:
    """Return the moments of no values, [mean, M2, count], (2C + 1,)."""
    mean = layer.buffers["running_mean"]
    return RawMoments(mean.new_zeros(2 * mean.numel() + 1, dtype=torch.float64))


def _pooled(one: RawMoments, other: RawMoments) -> RawMoments:
    """Return the moments of two sets of values together."""
    (mean, squares), (other_mean, other_squares) = halves(one), halves(other)
    total = one[-1:] + other[-1:]
    share = other[-1:] / or_one(total)
    apart = other_mean - mean
    pooled = torch.cat([mean + share * apart, squares + other_squares + apart.square() * one[-1:] * share, total])
    return RawMoments(pooled)


def _merged(group: Communicator, layers: Sequence[Layer], values: dict[int, RawMoments]) -> list[RawMoments]:
    """Return the moments of each layer over the ranks of a group. Raise if a layer has had one value."""
    of_ranks = group.all_gather_object({layer.path: RawMoments(values[id(layer.module)].cpu()) for layer in layers})
    check_same_layers(of_ranks)
    merged = [functools.reduce(_pooled, [of_rank[layer.path] for of_rank in of_ranks]) for layer in layers]
    for layer, moments in zip(layers, merged, strict=True):
        if 0 < moments[-1] <= 1:
            raise ValueError(
                f"expected more than 1 value per channel in the batches, got {moments[-1].item():g} in {layer.path}"
            )
    return merged


@contextlib.contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Restore the values of all buffers and the modes of all modules afterwards."""
    buffers = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for owner, name, buffer, values in buffers:
            owner[name] = buffer.copy_(values)
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _collecting(layers: Sequence[Layer], values: dict[int, RawMoments]) -> Iterator[None]:
    """Let the layers normalize by the batch, and add the moments of their inputs to `values`."""

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input = args[0] if args else kwargs["input"]
        mask = arguments.parse_mask(kwargs.get("mask"), input)
        values[id(module)] = _pooled(values[id(module)], Moments.of(input, mask).raw)

    handles = []
    try:
        for layer in layers:
            layer.module.training = True  # train() would also change the modules in it
            handles.append(layer.module.register_forward_pre_hook(add, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shown(batches: Iterable[Any]) -> Iterable[Any]:
    try:
        from rich.progress import track
    except ImportError:
        raise RuntimeError("expected rich for progress=True, got none: pip install rich") from None
    return track(batches, "running statistics")
