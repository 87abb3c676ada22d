"""Normalization by moments that depend on the input, or by constants: the one hand-written backward.

Shapes: input (N, C, *); mask what expands to (N, 1, *); weight, bias, mean, variance, invstd (C,); count ().

With x̂ = (x - mean) * invstd and y = x̂ * weight + bias, the loss L depends on x directly and, through the sums over all
ranks, by mean and invstd. The gradients with respect to these two are

    ∂L/∂mean   = -weight * invstd * Σ dy          summed over all ranks
    ∂L/∂invstd =  weight * Σ dy * (x - mean)      summed over all ranks

because the adjoint of a sum over the ranks is the sum over the ranks (L is the sum of the ranks' losses). Then

    dx = weight * invstd * dy + mask * (∂L/∂mean - invstd³ * ∂L/∂invstd * (x - mean)) / count

Moments about zero (RMSNorm) have no ∂L/∂mean. With epsilon outside of the root, invstd = 1 / (sqrt(variance) + eps),
invstd³ / (1 - eps * invstd) stands in the place of invstd³.

The function returns mean and invstd beside y and saves these outputs, so a backward with create_graph=True goes through
them to the input again: double backward, and any order above it, is the same code on the differentiable kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import kernels
from .communicators import Communicator
from .moments import Moments, or_one

__all__ = ["normalize", "normalize_by_constants"]


def normalize(
    input: Tensor,
    moments: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: Communicator,
    *,
    mask: Tensor | None = None,
    eps_outside: bool = False,
) -> Tensor:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias, where `moments` are of all the inputs of `group`.

    With `eps_outside` it divides by sqrt(variance) + eps. Backward issues one all-reduce of 2C float64 (C for moments
    about zero) if the input needs a gradient and the group has more than one rank.
    """
    options = (mask, moments.centered, eps_outside)
    output, _, _ = _Normalize.apply(  # type: ignore[no-untyped-call]
        input, weight, bias, moments.mean, moments.variance, or_one(moments.count), eps, group, *options
    )
    return output  # type: ignore[no-any-return]


def normalize_by_constants(
    input: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias for constant mean and variance. No collective."""
    options = (None, True, False)
    output, _, _ = _Normalize.apply(input, weight, bias, mean, variance, None, eps, None, *options)  # type: ignore[no-untyped-call]
    return output  # type: ignore[no-any-return]


class _Normalize(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        count: Tensor | None,  # None: mean and variance are constants
        eps: float,
        group: Communicator | None,
        mask: Tensor | None,
        centered: bool,
        eps_outside: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean = mean.to(torch.float64, copy=True)
        variance = variance.double()
        invstd = 1 / (variance.sqrt() + eps) if eps_outside else (variance + eps).rsqrt()
        output = kernels.select(input.device).normalize(input, mean, _scale(invstd, weight), bias)
        if count is None:
            ctx.mark_non_differentiable(mean, invstd)
        ctx.save_for_backward(input, weight, mean, invstd, count, mask)
        ctx.group, ctx.centered, ctx.outside = group, centered, eps if eps_outside else 0
        return output, mean, invstd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, grad_mean, grad_invstd = grads
        input, weight, mean, invstd, count, mask = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, *others = ctx.needs_input_grad
        kernel = kernels.reference if torch.is_grad_enabled() else kernels.select(input.device)
        sum_grad, sum_grad_centered = kernel.reduce_grad(grad_output, input, mean, mask)
        grad_weight = sum_grad_centered * invstd if needs_weight else None  # autograd casts to the weight's dtype
        grad_bias = sum_grad if needs_bias else None
        if not needs_input:
            return None, grad_weight, grad_bias, *[None] * len(others)

        scale = _scale(invstd, weight)
        slope = offset = None
        if count is not None:
            grad_invstd = grad_invstd + _scale(sum_grad_centered, weight)
            if ctx.centered:
                grad_mean = grad_mean - scale * sum_grad
                grad_mean, grad_invstd = _all_reduce(torch.cat([grad_mean, grad_invstd]), ctx.group).view(2, -1)
                offset = grad_mean / count
            else:
                grad_invstd = _all_reduce(grad_invstd, ctx.group)
                offset = torch.zeros_like(grad_invstd)
            inside = 1 - ctx.outside * invstd  # 0 where all values are, at which x is too
            slope = -(invstd**3) * grad_invstd / (count * torch.where(inside > 0, inside, 1))
        grad_input = kernel.grad_input(grad_output, input, mean, scale, slope, offset, mask)
        return grad_input, grad_weight, grad_bias, *[None] * len(others)


class _AllReduce(Function):
    """The sum over the ranks, as a differentiable operation."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Communicator) -> Tensor:
        ctx.group = group
        return group.all_reduce(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grads[0], ctx.group), None


def _all_reduce(tensor: Tensor, group: Communicator) -> Tensor:
    if group.size == 1:
        return tensor
    if not torch.is_grad_enabled():
        return group.all_reduce(tensor)
    return _AllReduce.apply(tensor, group)  # type: ignore[no-any-return, no-untyped-call]


def _scale(vector: Tensor, weight: Tensor | None) -> Tensor:
    return vector if weight is None else vector * weight
