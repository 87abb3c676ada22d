"""The running statistics of a whole model across the ranks: compare them, and merge those that have drifted apart.

A `SyncBatchNorm` keeps them the same bits on every rank. With the BatchNorm of torch.nn each rank has its own, and a
checkpoint has those of the rank that wrote it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .communicators import Communicator, ProcessGroupLike, communicator
from .errors import RunningStatsError, SyncNormError

__all__ = ["Layer", "assert_running_stats_agree", "check_same_layers", "layers_by_group", "sync_running_stats"]

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Layer(NamedTuple):
    """A layer with running statistics."""

    path: str
    module: nn.Module
    buffers: dict[str, Tensor]

    @property
    def batches(self) -> float:
        """How many batches are in the running statistics, 1 if they are not counted."""
        counter = self.buffers.get("num_batches_tracked")
        return 1.0 if counter is None else float(counter)


def assert_running_stats_agree(model: nn.Module, process_group: ProcessGroupLike = None) -> None:
    """Raise unless the running statistics of all layers are the same bits on all ranks.

    It compares `running_mean`, `running_var` and `num_batches_tracked` of all layers that have the first two: those of
    this package, of torch.nn and others.

    Args:
        model: it may be wrapped, as by DistributedDataParallel.
        process_group: the ranks. None: each layer's own process group if it has one, else that of
            `syncnorm.communicator()`.

    Collectives: for each process group two all-gathers of Python objects, or one if the statistics agree.

    Raises:
        RunningStatsError: on every rank, with the layers and buffers that differ, and which ranks have the same. It is
            a SyncNormError and an AssertionError.
        SyncNormError: on every rank, if the ranks' models have other layers.
    """
    problems: list[str] = []
    for group, layers in layers_by_group(model, process_group):
        own = {f"{layer.path}.{name}": tensor for layer in layers for name, tensor in layer.buffers.items()}
        digests = group.all_gather_object({name: _digest(tensor) for name, tensor in own.items()})
        check_same_layers(digests)
        unequal = [name for name in own if len({of[name] for of in digests}) > 1]
        if not unequal:
            continue
        values = group.all_gather_object({name: own[name].detach().double().cpu() for name in unequal})
        problems += [_described(name, [of[name] for of in digests], [of[name] for of in values]) for name in unequal]
    if problems:
        raise RunningStatsError("expected the same running statistics on all ranks, got\n" + "\n".join(problems))


@torch.no_grad()
def sync_running_stats(model: nn.Module, process_group: ProcessGroupLike = None) -> None:
    """Merge the running statistics of all ranks. Afterwards they are the same bits on every rank.

        mean = Σ n_r mean_r / Σ n_r        var = Σ n_r (var_r + (mean_r - mean)²) / Σ n_r

    with n_r the batches that rank r has counted in `num_batches_tracked`, or 1 if it does not count them. If all
    batches have the same size, these are mean and variance of the values of all ranks. The sums are float64, in the
    order of the ranks. A rank without batches does not contribute. If no rank has any, nothing changes.
    `num_batches_tracked` becomes the largest of the ranks'.

    Args:
        model: it may be wrapped, as by DistributedDataParallel.
        process_group: as in `assert_running_stats_agree`.

    Collectives: for each process group one all-gather of Python objects.

    Raises:
        SyncNormError: on every rank, if the ranks' models have other layers. Nothing has changed.
    """
    gathered = []
    for group, layers in layers_by_group(model, process_group):
        own = {
            layer.path: (layer.batches, *(layer.buffers[name].double().cpu() for name in BUFFERS[:2]))
            for layer in layers
        }
        of_ranks = group.all_gather_object(own)
        check_same_layers(of_ranks)
        gathered.append((layers, of_ranks))
    for layers, of_ranks in gathered:
        for layer in layers:
            _merge(layer, [of[layer.path] for of in of_ranks])


def _merge(layer: Layer, of_ranks: list[tuple[float, Tensor, Tensor]]) -> None:
    total = sum(batches for batches, _, _ in of_ranks)
    if total == 0:
        return
    mean = sum(batches * mean for batches, mean, _ in of_ranks) / total
    var = sum(batches * (var + (own - mean).square()) for batches, own, var in of_ranks) / total
    layer.buffers["running_mean"].copy_(mean)  # type: ignore[arg-type]
    layer.buffers["running_var"].copy_(var)  # type: ignore[arg-type]
    if "num_batches_tracked" in layer.buffers:
        layer.buffers["num_batches_tracked"].fill_(max(batches for batches, _, _ in of_ranks))


def layers_by_group(
    model: nn.Module, process_group: ProcessGroupLike, without: tuple[type[nn.Module], ...] = ()
) -> Iterator[tuple[Communicator, list[Layer]]]:
    """Yield the process groups, in the order of the layers, each with its layers, except those of some classes."""
    groups: dict[int, tuple[Communicator, list[Layer]]] = {}
    for path, module in model.named_modules():
        buffers = {name: getattr(module, name, None) for name in BUFFERS}
        tensors = {name: t for name, t in buffers.items() if isinstance(t, Tensor) and not is_lazy(t)}
        if isinstance(module, without) or not set(BUFFERS[:2]) <= set(tensors):
            continue
        own = getattr(module, "process_group", None)
        group = communicator(own if process_group is None else process_group)
        groups.setdefault(id(group), (group, []))[1].append(Layer(path or type(module).__name__, module, tensors))
    yield from groups.values()


def check_same_layers(of_ranks: list[dict[str, Any]]) -> None:
    """Raise SyncNormError unless all ranks have the same keys, which begin with the paths of their layers."""
    for rank, of in enumerate(of_ranks):
        if of.keys() != of_ranks[0].keys():
            different = ", ".join(sorted(of.keys() ^ of_ranks[0].keys()))
            raise SyncNormError(
                f"expected the same layers with running statistics on all ranks, got {different} either on rank 0 or "
                f"on rank {rank}"
            )


def _digest(tensor: Tensor) -> str:
    """Return a text that two tensors share if dtype, shape and all bits are the same."""
    values = tensor.detach().cpu().contiguous()
    bits = values.flatten().view(torch.uint8).numpy().tobytes() if values.numel() else b""
    return f"{values.dtype} {tuple(values.shape)} {hashlib.sha256(bits).hexdigest()}"


def _described(name: str, digests: list[str], values: list[Tensor]) -> str:
    """Return which ranks have the same values of a buffer, and how far those of the others are from those of rank 0."""
    ranks: dict[str, list[int]] = {}
    for rank, digest in enumerate(digests):
        ranks.setdefault(digest, []).append(rank)
    alike = [value for value in values if value.shape == values[0].shape]  # that of rank 0 is among them
    apart = torch.stack(alike).sub(values[0]).abs().flatten().amax().item() if values[0].numel() else 0.0
    same = " | ".join(f"rank{'s' * (len(some) > 1)} {', '.join(map(str, some))}" for some in ranks.values())
    return f"  {name}: {same}, up to {apart:.3g} apart"
