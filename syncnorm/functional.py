"""The norms as functions: the place where the flow is read.

All of them take moments over some axes, combine them over the ranks that share these axes, and apply one affine map.
`sync_batch_norm` shares the batch, which every data-parallel rank does. `layer_norm`, `rms_norm` and `group_norm` share
nothing between ranks, and call torch's own functions, unless their axes are split: features under tensor parallelism,
space or the channels of a group. Then they view their input as (1, rows, values) and go the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import arguments, running, transforms
from .all_reduce import all_reduce
from .autograd import normalize, normalize_by_constants
from .communicators import Communicator, LocalCommunicator, ProcessGroupLike, communicator
from .job.launcher import warn_if_not_joined
from .moments import Moments, MomentsAboutZero

__all__ = ["group_norm", "layer_norm", "rms_norm", "sync_batch_norm"]


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
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    inplace: bool = False,
) -> Tensor:
    """Batch normalization by the statistics of the whole batch, wherever its shards live.

        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    In training, mean and (biased) var of each channel are taken over the batch and trailing axes of *all* ranks'
    inputs, and the running statistics move towards them (see `syncnorm.running.update`); else the running statistics
    stand in their place. Shards may differ in all sizes but C; a shard may be empty. Tensors that have a shape and no
    values, on the meta device or in a FakeTensorMode, give the shapes of the results.

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
        eps: added to the variance; positive in training, at least 0 in eval.
        num_batches_tracked: () int64, counts the batches in training; needed for momentum=None. A batch that is empty
            on all ranks is not counted, and leaves the running statistics as they are.
        process_group: the ranks that share the batch, as in `syncnorm.communicator`.
        mask: (N, *) or (N, 1, *), or with 1 for any of these sizes, bool or floating point: which positions count, each
            rank with its own number of them. Statistics are those of the positions where it is true (or 1), on all
            ranks together. The others are normalized by these too, and their values may be anything; they have no part
            in the gradient of the statistics. A fraction counts as that much of a position: the n of mean, var and the
            unbiased var is the sum of the mask. It must not be negative, which is not looked at (on a GPU that would
            wait for the device).
        residual: added before the activation, of the input's shape and dtype.
        activation: None, "relu", "leaky_relu" (slope 0.01), "silu" or "gelu_tanh", in the same pass over the data.
            Backward keeps the input and, with a residual, the signs of its sum, one bit each (silu and gelu_tanh: the
            residual).
        inplace: write the output over the input, for activation None or "leaky_relu" and no residual. Backward keeps
            the output alone and computes the input from it: where the weight is small beside the bias, and in half
            precision, with fewer digits. The normalized input x̂ is estimated as (z - bias) * weight / (weight² + σ²),
            where σ = finfo(input.dtype).eps * |bias| / sqrt(12) is the standard deviation of the rounding of z. A
            weight well above σ gets an accurate gradient. For a weight below σ the output no longer holds the input:
            its gradient tends to 0 with the weight, and its error is at most the sum of |dL/dz| (|x̂| + 1).

    Collectives: in training on a group of more than one rank, one all-reduce of 2C + 1 float64 in forward and one of 2C
    in backward (none if the input needs no gradient), which all ranks of the group must reach. Otherwise none. Under
    forward-mode AD (`torch.func.jvp`, dual tensors) there is one of 2C + 1 float64 more for the tangents, and under
    `torch.func.vmap` each is one all-reduce for the whole batch. All ranks must apply the same transforms.

    Raises:
        ValueError: shapes do not fit; the activation is unknown or cannot be in place; eps is negative, or 0 in
            training; this rank is not in the group; the whole batch has one value per channel (with a mask on a GPU
            that is not looked at, which would wait for the device).
        TypeError: the input or a buffer is not floating point, the mask neither that nor bool, the residual not of the
            input's dtype; input, mask or residual is nested, sparse or mkldnn.
        RuntimeError: a parameter, the mask or the residual is on another device than the input; the input is to be
            written over and is a leaf that requires a gradient, a view in a graph, or expanded; a transform of
            torch.func was not given the running statistics, and cannot update them; torch.jit.trace, make_fx or
            torch.export would drop the all-reduce.

    Source: Ioffe and Szegedy, Batch Normalization, 2015; the moments are merged as Chan, Golub and LeVeque do, 1979;
    in place: Rota Bulò, Porzi and Kontschieder, In-Place Activated BatchNorm, 2018.
    """
    arguments.check_batch_norm_arguments(
        input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked
    )
    mask = arguments.parse_mask(mask, input)
    epilogue = arguments.parse_epilogue(input, weight, bias, residual, activation, inplace)
    if input.dim() == 1:  # of shape (0,): there is nothing to normalize
        return input if inplace else input.clone()
    if not training:
        assert running_mean is not None  # validated
        assert running_var is not None
        return normalize_by_constants(input, running_mean, running_var, weight, bias, eps, epilogue=epilogue)
    group = _sharing_batch(input, process_group)

    moments = _combined(Moments.of(input, mask), group)
    if _one_value(input, mask, moments):
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(input.shape)}"
            + (" and a mask" if mask is not None else "")
            + (f" on rank {group.rank} and 1 value on all {group.size} ranks" if group.size > 1 else "")
        )
    output = normalize(input, moments, weight, bias, eps, group, mask=mask, epilogue=epilogue)
    running.update(running_mean, running_var, num_batches_tracked, moments, momentum)
    return output


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    process_group: ProcessGroupLike = None,
) -> Tensor:
    """Layer normalization over the last axes, which may be split over ranks.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    mean and (biased) var are taken over the last axes, for each position of the others. Without a process group it is
    `torch.nn.functional.layer_norm`.

    Args:
        input: (*, *normalized_shape) floating point; the output has its dtype.
        normalized_shape: the last axes, or the last one, as they are on this rank.
        weight: of normalized_shape, or None.
        bias: of normalized_shape, or None.
        eps: added to the variance.
        process_group: the ranks among which the last axes are split, each with a share of any size, also none; the
            other axes are the same on all of them. The function trusts you in this, as the modules do not, which
            compare these axes at the first input of each size: ranks that differ hang, fail or get a wrong result.
            Weight and bias are this rank's shares, and so are their gradients.

    Collectives: with a process group of more than one rank, one all-reduce of 2R + 1 float64 in forward, for R
    positions, and one of 2R in backward. Otherwise none.

    Raises:
        ValueError: the last axes are not normalized_shape, or this rank is not in the group.
        TypeError: the input is not floating point, or is sparse or mkldnn; beside a process group also: nested or a
            DTensor; weight or bias is not a tensor, or another argument has the wrong type.

    Source: Ba, Kiros and Hinton, Layer Normalization, 2016.
    """
    arguments.check_numbers(eps=eps)
    shape = arguments.parse_normalized_shape(input, normalized_shape, weight, bias, split=process_group is not None)
    group = _sharing(input, process_group)
    if group.size == 1:
        return F.layer_norm(input, shape, weight, bias, eps)
    y = _normalize_rows(_rows(input, len(shape)), Moments, eps, group).view_as(input)
    return _affine(y, weight, bias).to(input.dtype)


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    bias: Tensor | None = None,
    eps_outside: bool = False,
    process_group: ProcessGroupLike = None,
) -> Tensor:
    """Root-mean-square normalization over the last axes, which may be split over ranks.

        y = x / sqrt(mean(x²) + eps) * weight + bias        with eps_outside: x / (sqrt(mean(x²)) + eps) * weight + bias

    The mean is taken over the last axes, for each position of the others. Without a process group and with epsilon
    inside of the root it is `torch.nn.functional.rms_norm`, plus the bias.

    Args:
        input: (*, *normalized_shape) floating point; the output has its dtype.
        normalized_shape: the last axes, or the last one, as they are on this rank.
        weight: of normalized_shape, or None.
        eps: added to the mean square, or to its root. None: what torch adds then, torch.finfo(torch.float32).eps, or
            that of float64 for such an input. (torch 2.6 itself adds finfo(input.dtype).eps in half precision.)
        bias: of normalized_shape, or None.
        eps_outside: add it to the root. Both definitions are in use; a checkpoint wants the one that it was trained by.
        process_group: the ranks among which the last axes are split, as in `layer_norm`; the other axes are
            not compared here either.

    Collectives: with a process group of more than one rank, one all-reduce of R + 1 float64 in forward, for R
    positions, and one of R in backward. Otherwise none.

    Raises:
        ValueError: the last axes are not normalized_shape, or this rank is not in the group.
        TypeError: the input is not floating point, or is sparse or mkldnn; beside a process group also: nested or a
            DTensor; weight or bias is not a tensor, or another argument has the wrong type.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """
    arguments.check_numbers_or_none(eps=eps)
    arguments.check_flags(eps_outside=eps_outside)
    shape = arguments.parse_normalized_shape(input, normalized_shape, weight, bias, split=process_group is not None)
    if eps_outside:
        arguments.check_dense("input", input)
    group = _sharing(input, process_group)
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    if group.size == 1 and not eps_outside:
        x = input if weight is None else input.to(weight.dtype)  # unlike layer_norm, it takes one dtype
        return _affine(F.rms_norm(x, shape, weight, eps), None, bias).to(input.dtype)
    y = _normalize_rows(_rows(input, len(shape)), MomentsAboutZero, eps, group, eps_outside=eps_outside).view_as(input)
    return _affine(y, weight, bias).to(input.dtype)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    process_group: ProcessGroupLike = None,
) -> Tensor:
    """Group normalization over the channels of a group and space, which may be split over ranks.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    mean and (biased) var are taken over space and the channels of each group, for each sample. Without a process group
    it is `torch.nn.functional.group_norm`.

    Args:
        input: (N, C, *) floating point; the output has its dtype.
        num_groups: into how many groups the C channels of this rank are divided.
        weight: (C,) or None.
        bias: (C,) or None.
        eps: added to the variance.
        process_group: the ranks that have a part of each group: of its space (images or volumes split along any axes),
            or of its channels. Shares may differ in size, also be empty; N and num_groups are the same on all of them.
            The function trusts you in this, as the module does not, which compares these two at the first input of
            each size: ranks that differ hang, fail or get a wrong result.
            Where space is split, the gradients of weight and bias are this rank's share, to be summed over the ranks.

    Collectives: with a process group of more than one rank, one all-reduce of 2 N num_groups + 1 float64 in forward and
    one of 2 N num_groups in backward. Otherwise none.

    Raises:
        ValueError: the groups do not divide the channels, shapes do not fit, or this rank is not in the group.
        TypeError: the input is not floating point, is nested, sparse or mkldnn, or is a DTensor beside a process group;
            weight or bias is not a tensor, or another argument has the wrong type.

    Source: Wu and He, Group Normalization, 2018.
    """
    arguments.check_numbers(eps=eps)
    arguments.check_groups(input, num_groups, weight, bias, split=process_group is not None)
    group = _sharing(input, process_group)
    if group.size == 1:
        return F.group_norm(input, num_groups, weight, bias, eps)
    rows = input.reshape(1, len(input) * num_groups, input.shape[1:].numel() // num_groups)
    y = _normalize_rows(rows, Moments, eps, group).view_as(input)
    per_channel = [None if t is None else t.view(-1, *[1] * (input.dim() - 2)) for t in (weight, bias)]
    return _affine(y, *per_channel).to(input.dtype)


def without_values(tensor: Tensor) -> bool:
    """Return whether a tensor has a shape alone: on the meta device, or in a FakeTensorMode that records no graph."""
    if tensor.is_meta or not isinstance(tensor, FakeTensor):
        return tensor.is_meta
    return not (torch.compiler.is_compiling() or transforms.recording())


def _sharing_batch(input: Tensor, process_group: ProcessGroupLike) -> Communicator:
    """Return the ranks that share the batch; without values there is nothing to share, and this one is alone."""
    if without_values(input):
        return _ALONE
    group = communicator(process_group)
    if process_group is None and isinstance(group, LocalCommunicator) and not torch.compiler.is_compiling():
        warn_if_not_joined()
    return group


def _sharing(input: Tensor, process_group: ProcessGroupLike) -> Communicator:
    """Return the ranks that share a sample: this one alone unless others were given."""
    return _ALONE if process_group is None or without_values(input) else communicator(process_group)


def _one_value(input: Tensor, mask: Tensor | None, moments: Moments) -> bool:
    """Return whether the whole batch has one value per channel; ask the device only where that can be so."""
    few = input.numel() <= input.shape[1] if mask is None else mask.is_cpu
    if few and without_values(input):
        return mask is None and len(input) * input.shape[2:].numel() == 1
    return few and bool((transforms.plain(moments.count) == 1).any())


def _rows(input: Tensor, axes: int) -> Tensor:
    """Return the input as (1, R, values): R positions as channels, the last axes as what they are normalized over."""
    return input.unsqueeze(0).flatten(-axes).flatten(0, -2).unsqueeze(0)  # no sizes, which a tracer would keep


def _normalize_rows(
    rows: Tensor, kind: type[Moments], eps: float, group: Communicator, *, eps_outside: bool = False
) -> Tensor:
    """Return rows, (1, R, values), normalized by the moments of each over all ranks; in float32 or better."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    moments = _combined(kind.of(rows), group)
    return normalize(rows, moments, None, None, eps, group, eps_outside=eps_outside)


def _combined(moments: Moments, group: Communicator) -> Moments:
    """Return the moments of all ranks: one all-reduce."""
    if group.size == 1:
        return moments
    packed = moments.pack()
    summed = all_reduce(packed, group) if moments.followed else group.all_reduce(packed)
    return type(moments).unpack(summed, moments.followed)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


_ALONE = LocalCommunicator()
