"""Synchronized BatchNorm as a function: the place where the flow is read.

Shapes: input (N, C, *) with any number of trailing axes; everything per channel (C,).
"""

from __future__ import annotations

from torch import Tensor

from . import running, validate
from .communicators import LocalCommunicator, ProcessGroupLike, communicator
from .launchers import warn_if_alone_in_a_larger_job
from .moments import Moments, count_per_channel
from .normalize import normalize, normalize_by_constants

__all__ = ["sync_batch_norm"]


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    process_group: ProcessGroupLike = None,
) -> Tensor:
    """Batch normalization by the statistics of the whole batch, wherever its shards live.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    In training, mean and (biased) var of each channel are taken over the batch and trailing axes of *all* ranks'
    inputs, and the running statistics move towards them (see `syncnorm.running.update`); else the running statistics
    stand in their place. Shards may differ in all sizes but C; a shard may be empty.

    Gradients are those of the sum of the ranks' losses. Those of weight and bias are this rank's share: their sum over
    the ranks is the gradient of the whole batch.

    Args:
        input: (N, C, *) floating point, in any memory format; the output has its dtype and memory format.
        running_mean: (C,) updated in place in training; None: not tracked.
        running_var: (C,) as running_mean; unbiased.
        weight: (C,) or None.
        bias: (C,) or None.
        training: normalize by the batch (True) or by the running statistics (False).
        momentum: the weight of this batch in the running statistics; None: their cumulative average.
        eps: added to the variance.
        num_batches_tracked: () int64, counts the batches in training; needed for momentum=None.
        process_group: the ranks that share the batch, as in `syncnorm.communicator`.

    Collectives: in training on a group of more than one rank, one all-reduce of 2C + 1 float64 in forward and one of 2C
    in backward (none if the input needs no gradient), which all ranks of the group must reach. Otherwise none.

    Raises:
        ValueError: shapes do not fit; eps is not positive; this rank is not in the group; the whole batch has one value
            per channel.
        TypeError: the input or a buffer is not floating point.
        RuntimeError: a parameter is on another device than the input.

    Source: Ioffe and Szegedy, Batch Normalization, 2015; the moments are merged as Chan, Golub and LeVeque do, 1979.
    """
    validate.batch_norm_arguments(
        input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked
    )
    if not training:
        assert running_mean is not None  # validated
        assert running_var is not None
        return normalize_by_constants(input, running_mean, running_var, weight, bias, eps)
    group = communicator(process_group)
    if process_group is None and isinstance(group, LocalCommunicator):
        warn_if_alone_in_a_larger_job()

    moments = Moments.of(input.detach())
    if group.size > 1:
        moments = Moments.unpack(group.all_reduce(moments.pack()))
    if count_per_channel(input) <= 1 and moments.count == 1:  # asks the device only where it can be so
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(input.shape)}"
            + (f" on rank {group.rank} and 1 value on all {group.size} ranks" if group.size > 1 else "")
        )
    output = normalize(input, moments, weight, bias, eps, group)
    running.update(running_mean, running_var, num_batches_tracked, moments, momentum)
    return output
