"""Why the first layer that departs does so: sentences from what the ranks and the one process know of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .comparison import ACTIVATIONS, INITIAL, STATISTICS, Departure, Found
from .traits import MIXES, RANDOM

__all__ = ["reason"]


def reason(rank: int, departure: Departure, found: Sequence[Found], traits: Mapping[str, str]) -> str:
    """Return why a rank departs from one process, as far as this is known.

    Args:
        rank: the one that departs first.
        departure: where.
        found: the outcomes of all ranks.
        traits: of the layers, as one process has them.
    """
    layer = f"layer {departure.layer} ({found[rank].kinds.get(departure.layer, 'a module')})"
    if departure.quantity == INITIAL:
        return (
            f"Rank {rank} starts with another value of {departure.name} than one process: the model is not built the "
            "same on each rank.\nLook for the rank number and for random seeds where it is built, or broadcast its "
            "state from rank 0, as DistributedDataParallel does."
        )
    if departure.quantity == ACTIVATIONS:
        return _of_activations(rank, departure, layer, found, traits)
    if departure.quantity == STATISTICS:
        return _of_statistics(rank, departure, layer, found)
    return (
        f"The forward pass of {layer} agrees, the gradient of {departure.name} does not.\nA layer after it sums "
        "over the ranks in its forward pass and not in its backward pass, or weighs the ranks differently there."
    )


def _of_activations(
    rank: int, departure: Departure, layer: str, found: Sequence[Found], traits: Mapping[str, str]
) -> str:
    trait, subject = traits.get(departure.layer, ""), layer[0].upper() + layer[1:]
    if trait == RANDOM:
        return (
            f"{subject} is random: called twice, it computes something else. Each rank draws other numbers than one "
            "process.\nSwitch it off to verify the rest."
        )
    if "nan" in departure.traits:
        return f"{subject} gives NaN on rank {rank}, and numbers in one process.\nIs there a rank without samples?"
    if "local" in departure.traits:
        return (
            f"{subject} normalizes by the statistics of rank {rank}'s shard alone.\nIf it is a BatchNorm, convert it: "
            "syncnorm.convert_sync_batchnorm(model). If it is converted, its process group has only this rank."
        )
    of_ranks = [outcome.statistics[departure.layer] for outcome in found if departure.layer in outcome.statistics]
    counts = [count for count, _, _ in of_ranks]
    if departure.step == 0 and len({*counts}) > 1:
        return (
            f"{subject} does not normalize by the statistics of the whole batch. The ranks' shards have "
            f"{', '.join(map(str, counts))} values a channel:\nthe ranks have to be weighted by these counts, and not "
            "equally."
        )
    if departure.step == 0 and of_ranks and _cancels(of_ranks):
        return (
            f"{subject} loses the digits of the variance: the mean is large beside the standard deviation, and the "
            "difference of E[x^2] and E[x]^2 cancels."
        )
    if trait == MIXES:
        return (
            f"{subject} computes a sample's output from other samples of the batch too. On a shard there are "
            "fewer of them.\nSynchronize it, or replace it."
        )
    return f"{subject} computes something else from the same input than it does in one process."


def _cancels(of_ranks: Sequence[tuple[int, Tensor, Tensor]]) -> bool:
    mean = torch.stack([mean for _, mean, _ in of_ranks]).mean(0)
    variance = torch.stack([square for _, _, square in of_ranks]).mean(0) - mean.square()
    return bool((mean.square() > 1e3 * variance).any())


def _of_statistics(rank: int, departure: Departure, layer: str, found: Sequence[Found]) -> str:
    name = departure.name
    for trait in departure.traits:
        if trait == "local":
            return (
                f"{name} of rank {rank} is that of its own shard: {layer} normalizes by the whole batch, and updates "
                "its running statistics from a part of it."
            )
        if trait == "biased":
            return f"{name} is updated with the biased variance, divided by n. torch.nn.BatchNorm divides by n - 1."
        if trait.startswith("momentum"):
            _, given, used = trait.split()
            return f"{name} moves as with a momentum of {used}, and {layer} has one of {given}."
    if len({outcome.final.get(name) for outcome in found}) > 1:
        return f"{name} differs between the ranks: each updates it by itself."
    return f"{name} is the same on all ranks, and another one than that of one process."
