"""Normalization by moments as an autograd Function: the one hand-written backward.

Shapes: input and residual (N, C, *); mask what expands to (N, 1, *); weight, bias (C,); statistics (2C + 1,) = [mean,
invstd, count]; sums (2C,), in a message (2C + 2,).

With x̂ = (x - mean) * invstd, z = x̂ * weight + bias + residual and y = activation(z), the loss L depends on x directly
and, through the sums over all ranks, by mean and invstd. The gradients with respect to these two are

    ∂L/∂mean   = -invstd * Σ weight * dz            summed over all ranks
    ∂L/∂invstd =  Σ weight * dz * x̂ / invstd        summed over all ranks

because the adjoint of a sum over the ranks is the sum over the ranks (L is the sum of the ranks' losses). Then

    dx = weight * invstd * dz + mask * (∂L/∂mean - invstd² * x̂ * ∂L/∂invstd) / count
       = weight * invstd * dz - mask * invstd * (Σ weight * dz + x̂ * Σ weight * dz * x̂) / count

Moments about zero (RMSNorm) have no ∂L/∂mean. With epsilon outside of the root, invstd = 1 / (sqrt(variance) + eps),
the last sum is divided by 1 - eps * invstd.

The function returns the statistics beside y and saves these outputs, so a backward with create_graph=True goes through
them to the input again: double backward, and any order above it, is the same code on the differentiable kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import finite, kernels, transforms
from .all_reduce import sum_over_ranks
from .arguments import memory_of
from .exchange import NO_EXCHANGE, Exchange
from .kernels import PLAIN, Epilogue, Kernels, Packed, RawMoments, Running, Saved, Stamp, StampError, Statistics
from .kernels.layout import channels_last
from .moments import Moments
from .reproducible import NOT_DIFFERENTIABLE, sums_in_fixed_point
from .running import move

__all__ = ["Normalize", "normalize"]


def normalize(
    input: Tensor,
    moments: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    exchange: Exchange,
    *,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    running: Running | None = None,
    eps_outside: bool = False,
    epilogue: Epilogue = PLAIN,
    reproducible: bool = False,
) -> Tensor:
    """Return activation((x - mean) / sqrt(variance + eps) * weight + bias + residual).

    `moments` are those of the inputs of all ranks, or constants. With `eps_outside` it divides by sqrt(variance) + eps.
    Updates the running statistics with the moments.

    Collectives: in backward one all-reduce of 2C + 2 float64 (C + 2 for moments about zero), if the group has more than
    one rank, the input needs a gradient and the moments are not constant. With `reproducible` two, see
    `reproducible.sums_in_fixed_point`.

    Raises:
        DesyncError: the ranks have summed messages of different calls. Nothing has been written.
    """
    try:
        if moments.followed:
            output = _composed(input, moments.raw, weight, bias, residual, eps, eps_outside, epilogue)
            move(running, moments)
            return output
        traced = moments.kernels is kernels.reference  # torch.compile follows no update of buffers inside the Function
        of_moments = moments.kernels, moments.stamp, moments.centered, moments.constant
        config = Config(*of_moments, eps, eps_outside, exchange, epilogue, reproducible, transforms.compiling())
        written = memory_of(input) if epilogue.inplace else input
        if traced:
            output, _ = Normalize.apply(written, weight, bias, residual, moments.values, mask, config, None)  # type: ignore[no-untyped-call]
            move(running, moments)
        else:
            output, _ = _apply(written, weight, bias, residual, (moments.values,), mask, config, running)  # type: ignore[no-untyped-call]
        return output if written is input else input
    except StampError:
        raise exchange.mismatch(backward=False) from None


def _composed(
    input: Tensor,
    moments: RawMoments,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    eps_outside: bool,
    epilogue: Epilogue,
) -> Tensor:
    """Return y by torch's own operations, through which the derivatives go to the moments and so to the input."""
    reference = kernels.reference
    z, _ = reference.preactivation(input, moments, weight, bias, residual, eps, eps_outside=eps_outside)
    y = reference.activate(z, epilogue.activation).to(input.dtype)
    return input.copy_(y) if epilogue.inplace else y


class Config(NamedTuple):
    """What a normalization does, beside the tensors."""

    kernels: Kernels  # of the forward
    stamp: Stamp | None  # of the moments
    centered: bool
    constant: bool  # whether the moments are
    eps: float
    eps_outside: bool
    exchange: Exchange
    epilogue: Epilogue
    reproducible: bool  # whether the sums of the gradients are
    is_compiled: bool  # whether torch.compile records both directions


class Normalize(Function):
    """See `normalize`. Inputs without gradients: moments (2C + 1,) or (2C + 3,), mask, config, running statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        moments: RawMoments | Packed | tuple[RawMoments | Packed],
        mask: Tensor | None,
        config: Config,
        running: Running | None,
    ) -> tuple[Tensor, Statistics]:
        """Return y = activation(x̂ * weight + bias + residual), and [mean, invstd, count].

        Moments in a tuple are no input for autograd, so that their memory can become that of the statistics.
        """
        epilogue = config.epilogue
        if overwrite := isinstance(moments, tuple):
            (moments,) = moments
        output, statistics, signs = config.kernels.normalize(
            input,
            moments,
            weight,
            bias,
            residual,
            config.eps,
            stamp=config.stamp,
            eps_outside=config.eps_outside,
            epilogue=epilogue,
            running=running,
            overwrite=overwrite,
        )
        if epilogue.inplace:
            ctx.mark_dirty(input)
        if config.constant:
            ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        of_epilogue = (
            output if epilogue.inplace else input,
            signs,
            residual if residual is not None and epilogue.saves_residual else None,
        )
        bias_or_none = bias if epilogue is not PLAIN and epilogue.needs_bias else None
        ctx.save_for_backward(*of_epilogue, statistics, weight, bias_or_none, mask)
        ctx.config, ctx.dtype = config, _common_dtype(weight, bias)
        if signs is not None:
            ctx.channels_last = bool(channels_last(input))
        return output, statistics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight, bias and residual: dx, Σ dz * x̂, Σ dz, dz."""
        grad_output, grad_statistics = grads
        tensors = ctx.saved_tensors  # once: activation checkpointing computes them again
        input, signs, residual, statistics, weight, bias, mask = tensors
        needs_input, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        config: Config = ctx.config
        is_transformed = not config.exchange.in_graph and transforms.active(grad_output, grad_statistics)
        followed = torch.is_grad_enabled() or is_transformed
        chosen = _kernels_of_backward(config, followed, grad_output, *tensors)
        kept = Saved(input, signs, residual)
        if signs is not None:
            kept = _in_saved_order(kept, ctx.channels_last)
        if grad_output is None:
            grad_output = torch.zeros_like(kept.input)
        given, options = (grad_output, kept, statistics, weight, bias), {"mask": mask, "epilogue": config.epilogue}
        passes = chosen.Backward(*given, **options)
        through_statistics = needs_input and not config.constant
        stamp = config.exchange.stamp(backward=True) if through_statistics else None
        grad_weight = grad_bias = summed = grad_input = None
        if config.reproducible:
            if followed and not config.is_compiled:
                raise RuntimeError(NOT_DIFFERENTIABLE)
            stamp = None
            exchange = config.exchange if through_statistics else NO_EXCHANGE
            implementation, in_fixed_point = kernels.with_fixed_point(chosen)
            summing = passes if implementation is chosen else implementation.Backward(*given, **options)
            grad_weight, grad_bias, sums = sums_in_fixed_point(
                *(in_fixed_point, summing, grad_output, kept.input, statistics, weight),
                dtype=ctx.dtype,
                exchange=exchange,
            )
            summed = sums if through_statistics else None
        elif through_statistics or needs_weight or needs_bias:
            # Σ dz * x̂, Σ dz, [Σ weight * dz, Σ weight * dz * x̂], and in a message [..., h, h²]
            grad_weight, grad_bias, sums = passes.reduce_grad(ctx.dtype, stamp=stamp)
            if through_statistics:
                if grad_statistics is not None:  # of a backward pass through this backward pass
                    sums = _added(sums, _sums_of(grad_statistics, statistics))
                own = sums.clone() if finite.checks() and not followed else None
                summed = sums if config.exchange.size == 1 else _sum_over_ranks(sums, config, followed)
                if own is not None:
                    finite.check(summed, own, grad_output, config.exchange, backward=True)
        grad_residual = grad_output
        if needs_input or (needs_residual and kept.has_residual):
            eps_outside = config.eps if config.eps_outside else 0.0
            try:
                grad_input, dz = passes.grad_input(
                    summed, stamp=stamp, centered=config.centered, eps_outside=eps_outside
                )
            except StampError:
                raise config.exchange.mismatch(backward=True) from None
            grad_residual = grad_output if dz is None else dz
        return (
            grad_input,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            grad_residual if needs_residual else None,
            *(None, None, None, None),
        )


_apply = super(Function, Normalize).apply  # without what torch.func needs: `normalize` knows that it is not active


def _kernels_of_backward(
    config: Config, followed: bool, grad_output: Tensor | None, input: Tensor, *others: Tensor | None
) -> Kernels:
    """Return the implementation: that of the forward, unless a transform or a hook of autograd has come in between."""
    if followed:
        return kernels.reference
    is_traced = torch.compiler.is_dynamo_compiling()
    if type(grad_output) is type(input) is Tensor and config.kernels is not kernels.reference and not is_traced:
        return config.kernels
    return kernels.select(input, *others, grad_output)


def _in_saved_order(saved: Saved, is_channels_last: bool) -> Saved:
    """Return what was saved with the input in the order that its signs have in memory.

    A hook of autograd such as `save_on_cpu` may have given it another memory format.
    """
    input = saved.input
    if bool(channels_last(input)) == is_channels_last:
        return saved
    restored = input.movedim(1, -1).contiguous().movedim(-1, 1) if is_channels_last else input.contiguous()
    return saved._replace(input=restored)


def _common_dtype(weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    """Return a dtype that holds the gradients of both; autograd gives each its own."""
    if weight is None:
        return torch.float64 if bias is None else bias.dtype
    if bias is None or bias.dtype == weight.dtype:
        return weight.dtype
    return torch.promote_types(weight.dtype, bias.dtype)


def _sums_of(grad_statistics: Tensor, statistics: Statistics) -> Tensor:
    """Return what a gradient with respect to mean and invstd adds to the sums; the count is a constant."""
    _, invstd = kernels.halves(statistics)
    return grad_statistics[:-1] * torch.cat([-1 / invstd, invstd])


def _added(sums: Tensor, others: Tensor) -> Tensor:
    """Return the sums of a message, (2C,) or (2C + 2,), with others added, (2C,)."""
    length = len(others)
    return torch.cat([sums[:length] + others, sums[length:]])


def _sum_over_ranks(sums: Tensor, config: Config, followed: bool) -> Tensor:
    """Return the sums of all ranks, as in a message. Of moments about zero only the second one is needed, and sent."""
    exchange = config.exchange
    if config.centered:
        return sum_over_ranks(sums, exchange, backward=True, followed=followed)
    channels = (len(sums) - 2) // 2
    second = sum_over_ranks(sums[channels:].clone(), exchange, backward=True, followed=followed)  # (C + 2,)
    return torch.cat([torch.zeros_like(second[:channels]), second])
