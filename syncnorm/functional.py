"""The norms as functions. The forward pass of each norm can be read here.

A norm computes moments over some axes, combines them over the ranks that share these axes, and applies one affine map.
`sync_batch_norm` combines them over the batch, which data parallelism splits over the ranks. `layer_norm`, `rms_norm`
and `group_norm` combine nothing and call torch's own functions, unless their axes are split over ranks: features under
tensor parallelism, space, or the channels of a group. They then view their input as (1, rows, values) and take the same
steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_dynamo_compiling

from . import arguments, checkpointing, exported, finite, one_value, recorded, running, transforms
from .all_reduce import sum_over_ranks
from .autograd import normalize
from .communicators import LocalCommunicator, ProcessGroupLike, communicator
from .exchange import NO_EXCHANGE, Exchange, of_function
from .job.launcher import warn_if_not_joined
from .kernels import PLAIN, Stamp, StampError, plain
from .moments import Moments
from .reproducible import moments_in_fixed_point

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
    check_finite: bool = False,
    reproducible: bool = False,
) -> Tensor:
    """Batch normalization by the statistics of the whole batch, which is distributed over the ranks of a process group.

        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    This is the function of `syncnorm.SyncBatchNorm`. Running statistics and parameters are passed in.

    Args:
        input: (N, C, *) floating point, in any memory format.
        running_mean: (C,), updated in place in training. None: not tracked.
        running_var: (C,), as running_mean. It is updated with the unbiased variance.
        weight: (C,) or None.
        bias: (C,) or None.
        training: normalize by the statistics of the batch (True) or by the running statistics (False).
        num_batches_tracked: () int64, counts the batches in training. Required for momentum=None. A batch that is empty
            on all ranks is not counted and does not change the running statistics.

    Other arguments, errors and the source: see `syncnorm.SyncBatchNorm` and its forward.

    Collectives: in training on a group of more than one rank, one all-reduce of 2C + 3 float64 in forward and one of
    2C + 2 in backward (none if the input needs no gradient), with `reproducible` two each. All ranks of the group must
    issue them, in the same order. Unlike the module, the function does not compare which layer and call the ranks are
    in. For forward-mode AD and vmap see the class.
    """
    if is_dynamo_compiling():
        return _batch_norm_in_graph(
            *(input, running_mean, running_var, weight, bias, training, momentum, eps),
            num_batches_tracked=num_batches_tracked,
            handle=recorded.handle_of(process_group if training else NO_EXCHANGE),  # type: ignore[arg-type]
            mask=mask,
            residual=residual,
            activation=activation,
            inplace=inplace,
            reproducible=reproducible,
        )
    are_plain = arguments.check_batch_norm_arguments(
        input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked
    )
    are_plain = are_plain and residual is None and mask is None
    if not are_plain:
        input, weight, bias, residual = transforms.unwrapped(input, weight, bias, residual)
        buffers = transforms.unwrapped(running_mean, running_var, num_batches_tracked)
        running_mean, running_var, num_batches_tracked = buffers
    if mask is not None:
        mask = arguments.parse_mask(mask, input)
    epilogue = PLAIN
    if residual is not None or activation is not None or inplace:
        epilogue = arguments.parse_epilogue(input, weight, bias, residual, activation, inplace)
    if input.dim() == 1:  # of shape (0,)
        return input if inplace else input.clone()
    if not training:
        assert running_mean is not None  # checked above
        assert running_var is not None
        if transforms.exporting() and exported.can_export(input, running_mean, running_var, weight, bias):
            return exported.batch_norm(input, running_mean, running_var, weight, bias, eps, residual, epilogue)
        moments = Moments.given(running_mean, running_var, input, weight, bias, residual)
        return normalize(input, moments, weight, bias, eps, NO_EXCHANGE, residual=residual, epilogue=epilogue)
    segments = checkpointing.enclosing()
    hidden = None if segments is None else checkpointing.hide_from_policies()
    try:
        if segments is not None and (call := segments.recall()) is not None:
            moments, exchange, moved = *call, None
        else:
            alone = process_group is NO_EXCHANGE  # type: ignore[comparison-overlap]  # as a module passes it
            exchange = NO_EXCHANGE if alone else _sharing_batch(input, process_group)
            others = weight, bias, residual, running_mean, running_var, num_batches_tracked
            checks = finite.checks(check_finite)
            if reproducible:
                moments = moments_in_fixed_point(input, mask, *others, exchange=exchange, checks=checks)
            else:
                moments = _moments(input, mask, *others, exchange=exchange, are_plain=are_plain, checks=checks)
            if mask is not None or input.numel() <= input.shape[1]:
                moments = _more_than_one_value(input, mask, moments, exchange)
            if segments is not None:
                segments.keep(checkpointing.Call(moments, exchange))
            moved = running.to_move(running_mean, running_var, num_batches_tracked, momentum)
        return normalize(
            *(input, moments, weight, bias, eps, exchange),
            mask=mask,
            residual=residual,
            running=moved,
            epilogue=epilogue,
            reproducible=reproducible,
        )
    finally:
        if hidden is not None:
            hidden.close()


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    process_group: ProcessGroupLike = None,
    reproducible: bool = False,
) -> Tensor:
    """Layer normalization over the last axes, which may be split over ranks.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    This is the function of `syncnorm.LayerNorm`. Without a process group it is `torch.nn.functional.layer_norm`.

    Args:
        weight: of normalized_shape, or None.
        bias: of normalized_shape, or None.

    Other arguments, errors and the source: see `syncnorm.LayerNorm`.

    Collectives: with a process group of more than one rank, one all-reduce of 2R + 3 float64 in forward, for R
    positions, and one of 2R + 2 in backward. Otherwise none. Unlike the module, the function does not compare the other
    axes of the ranks. If they differ, the call hangs, fails or returns a wrong result.
    """
    if (process_group is not None or reproducible) and is_dynamo_compiling():
        handle = _handle(process_group)
        return _layer_norm_in_graph(
            input, normalized_shape, weight, bias, eps, handle=handle, reproducible=reproducible
        )
    arguments.check_numbers(eps=eps)
    shape = arguments.parse_normalized_shape(input, normalized_shape, weight, bias, split=process_group is not None)
    exchange = _sharing(input, process_group, input.shape[: -len(shape)], "layer_norm")
    if exchange.size == 1 and not reproducible:
        return F.layer_norm(input, shape, weight, bias, eps)
    y = _normalize_rows(_rows(input, len(shape)), eps, exchange, reproducible=reproducible).view_as(input)
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
    reproducible: bool = False,
) -> Tensor:
    """Root-mean-square normalization over the last axes, which may be split over ranks.

        y = x / sqrt(mean(x²) + eps) * weight + bias        with eps_outside: x / (sqrt(mean(x²)) + eps) * weight + bias

    This is the function of `syncnorm.RMSNorm`. Without a process group and with eps inside the root it is
    `torch.nn.functional.rms_norm`, plus the bias.

    Args:
        weight: of normalized_shape, or None.
        bias: of normalized_shape, or None.

    Other arguments, errors and the source: see `syncnorm.RMSNorm`.

    Collectives: with a process group of more than one rank, one all-reduce of R + 3 float64 in forward, for R
    positions, and one of R + 2 in backward. Otherwise none. As in `layer_norm`, the other axes are not compared.
    """
    if (process_group is not None or reproducible) and is_dynamo_compiling():
        handle = _handle(process_group)
        options = {"bias": bias, "eps_outside": eps_outside, "reproducible": reproducible}
        return _rms_norm_in_graph(input, normalized_shape, weight, eps, handle=handle, **options)
    arguments.check_numbers_or_none(eps=eps)
    arguments.check_flags(eps_outside=eps_outside)
    shape = arguments.parse_normalized_shape(input, normalized_shape, weight, bias, split=process_group is not None)
    if eps_outside:
        arguments.check_dense("input", input)
    exchange = _sharing(input, process_group, input.shape[: -len(shape)], "rms_norm")
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    if exchange.size == 1 and not eps_outside and not reproducible:
        x = input if weight is None else input.to(weight.dtype)  # unlike F.layer_norm, it requires equal dtypes
        return _affine(F.rms_norm(x, shape, weight, eps), None, bias).to(input.dtype)
    rows = _rows(input, len(shape))
    y = _normalize_rows(rows, eps, exchange, centered=False, eps_outside=eps_outside, reproducible=reproducible)
    return _affine(y.view_as(input), weight, bias).to(input.dtype)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    process_group: ProcessGroupLike = None,
    reproducible: bool = False,
) -> Tensor:
    """Group normalization over space and the channels of a group, which may be split over ranks.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    This is the function of `syncnorm.GroupNorm`. Without a process group it is `torch.nn.functional.group_norm`.

    Args:
        weight: (C,) or None.
        bias: (C,) or None.

    Other arguments, errors and the source: see `syncnorm.GroupNorm`.

    Collectives: with a process group of more than one rank, one all-reduce of 2 N num_groups + 3 float64 in forward and
    one of 2 N num_groups + 2 in backward. Otherwise none. Unlike the module, the function does not compare N and
    num_groups of the ranks. If they differ, the call hangs, fails or returns a wrong result.
    """
    if (process_group is not None or reproducible) and is_dynamo_compiling():
        handle = _handle(process_group)
        return _group_norm_in_graph(input, num_groups, weight, bias, eps, handle=handle, reproducible=reproducible)
    arguments.check_numbers(eps=eps)
    arguments.check_groups(input, num_groups, weight, bias, split=process_group is not None)
    exchange = _sharing(input, process_group, torch.Size([len(input), num_groups]), "group_norm")
    if exchange.size == 1 and not reproducible:
        return F.group_norm(input, num_groups, weight, bias, eps)
    rows = input.reshape(1, len(input) * num_groups, input.shape[1:].numel() // num_groups)
    y = _normalize_rows(rows, eps, exchange, reproducible=reproducible).view_as(input)
    per_channel = [None if t is None else t.view(-1, *[1] * (input.dim() - 2)) for t in (weight, bias)]
    return _affine(y, *per_channel).to(input.dtype)


def without_values(tensor: Tensor) -> bool:
    """Return whether a tensor has no values: on the meta device, or in a FakeTensorMode that records no graph."""
    if transforms.compiling():
        return False
    if tensor.is_meta or not isinstance(tensor, FakeTensor):
        return tensor.is_meta
    return not (torch.compiler.is_compiling() or transforms.recording())


def _handle(process_group: ProcessGroupLike) -> int | None:
    """Return the handle of the ranks that share a sample, for a graph of torch.compile."""
    return recorded.handle_of(NO_EXCHANGE if process_group is None else process_group)  # type: ignore[arg-type]


def _sharing_batch(input: Tensor, process_group: ProcessGroupLike) -> Exchange:
    """Return the exchange with the ranks that share the batch. For an input without values there is none."""
    if without_values(input):
        return NO_EXCHANGE
    if process_group is None and isinstance(communicator(), LocalCommunicator):
        warn_if_not_joined()
        return NO_EXCHANGE
    return _exchange(input, process_group, input.shape[1], "sync_batch_norm", "C")


def _sharing(input: Tensor, process_group: ProcessGroupLike, rows: torch.Size, name: str) -> Exchange:
    """Return the exchange with the ranks that share a sample: none without a process group or without values."""
    if process_group is None or without_values(input):
        return NO_EXCHANGE
    return _exchange(input, process_group, rows.numel(), name, "R")


def _exchange(input: Tensor, process_group: ProcessGroupLike, channels: int, name: str, axis: str) -> Exchange:
    """Return the exchange that a module has passed as its process group, or that of the call of this function."""
    if isinstance(process_group, Exchange):
        return _on(process_group, input, channels)
    group = communicator(process_group)
    if isinstance(group, LocalCommunicator):
        return NO_EXCHANGE
    return _on(Exchange(group, of_function(name, axis)), input, channels)


def _on(exchange: Exchange, input: Tensor, channels: int) -> Exchange:
    """Set the input of an exchange, unless a tracer records it: that sends nothing, and its sizes may be tensors."""
    return exchange if transforms.recording() else exchange.on(input, channels)


def _more_than_one_value(input: Tensor, mask: Tensor | None, moments: Moments, exchange: Exchange) -> Moments:
    """Return the moments. Raise if the whole batch has one value per channel, where this rank has no more.

    Reads the device, unless there is a mask on it: then it checks nothing.
    """
    if mask is not None and not mask.is_cpu:
        return moments
    place = input.shape, mask is not None, exchange.rank, exchange.size
    if transforms.compiling():
        return one_value.refuse(moments, *place)
    if without_values(input):
        found = mask is None and len(input) * input.shape[2:].numel() == 1
    else:
        found = bool((plain(moments.count) == 1).any())
    if found:
        _check(moments, exchange)
        raise one_value.error(*place)
    return moments


def _check(moments: Moments, exchange: Exchange) -> None:
    """Raise DesyncError if the moments were summed with those of another call."""
    try:
        moments.raw  # noqa: B018
    except StampError:
        raise exchange.mismatch(backward=False) from None


def _rows(input: Tensor, axes: int) -> Tensor:
    """Return the input as (1, R, values): one row for each of R positions, the last axes as its values."""
    return input.unsqueeze(0).flatten(-axes).flatten(0, -2).unsqueeze(0)  # a tracer would record sizes as constants


def _normalize_rows(
    rows: Tensor,
    eps: float,
    exchange: Exchange,
    *,
    centered: bool = True,
    eps_outside: bool = False,
    reproducible: bool = False,
) -> Tensor:
    """Return rows, (1, R, values), each normalized by its moments over all ranks, in float32 or float64."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if reproducible:
        moments = moments_in_fixed_point(rows, None, exchange=exchange, centered=centered)
        return normalize(rows, moments, None, None, eps, exchange, eps_outside=eps_outside, reproducible=True)
    stamp = exchange.stamp(backward=False)
    moments = Moments.of(rows, stamp=stamp if centered or stamp else Stamp(0, 1))  # about zero they are packed
    moments = moments if centered else moments.about_zero()
    if exchange.size > 1:
        moments = _of_all_ranks(moments, exchange)
    return normalize(rows, moments, None, None, eps, exchange, eps_outside=eps_outside)


def _moments(
    input: Tensor, mask: Tensor | None, *others: Tensor | None, exchange: Exchange, are_plain: bool, checks: bool
) -> Moments:
    """Return the moments of all ranks. Arguments as of `Moments.of`; with `checks`, raise unless they are finite."""
    moments = Moments.of(input, mask, *others, stamp=exchange.stamp(backward=False), are_plain=are_plain)
    own = moments.values.clone() if checks else None
    if exchange.size > 1:
        moments = _of_all_ranks(moments, exchange)
    if own is not None:
        finite.check(moments.values, own, input, exchange, backward=False)
    return moments


def _of_all_ranks(moments: Moments, exchange: Exchange) -> Moments:
    """Return the moments of all ranks from packed ones of this rank. Issues one all-reduce."""
    summands = moments.summands  # [n·mean, M2 + n·mean², n, h, h²], (2C + 3,) float64; about zero (C + 3,)
    return moments.with_sums(sum_over_ranks(summands, exchange, backward=False, followed=moments.followed))


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


_batch_norm_in_graph = recorded.in_graph(sync_batch_norm)
_layer_norm_in_graph = recorded.in_graph(layer_norm)
_rms_norm_in_graph = recorded.in_graph(rms_norm)
_group_norm_in_graph = recorded.in_graph(group_norm)
