"""Normalization by moments that depend on the input, or by constants: the one hand-written backward.

Shapes: input (N, C, *); weight, bias, mean, variance, invstd (C,); count ().

With x̂ = (x - mean) * invstd and y = x̂ * weight + bias, the loss L depends on x directly and, through the sums over all
ranks, by mean and invstd. The gradients with respect to these two are

    ∂L/∂mean   = -weight * invstd * Σ dy          summed over all ranks
    ∂L/∂invstd =  weight * Σ dy * (x - mean)      summed over all ranks

because the adjoint of a sum over the ranks is the sum over the ranks (L is the sum of the ranks' losses). Then

    dx = weight * invstd * dy + (∂L/∂mean - invstd³ * ∂L/∂invstd * (x - mean)) / count

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
from .moments import Moments

__all__ = ["normalize", "normalize_by_constants"]


def normalize(
    input: Tensor, moments: Moments, weight: Tensor | None, bias: Tensor | None, eps: float, group: Communicator
) -> Tensor:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias, where `moments` are of all the inputs of `group`.

    Backward issues one all-reduce of 2C float64 if the input needs a gradient and the group has more than one rank.
    """
    output, _, _ = _Normalize.apply(input, weight, bias, moments.mean, moments.variance, moments.count, eps, group)  # type: ignore[no-untyped-call]
    return output  # type: ignore[no-any-return]


def normalize_by_constants(
    input: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias for constant mean and variance. No collective."""
    output, _, _ = _Normalize.apply(input, weight, bias, mean, variance, None, eps, None)  # type: ignore[no-untyped-call]
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean = mean.to(torch.float64, copy=True)
        invstd = (variance.double() + eps).rsqrt()
        output = kernels.select(input.device).normalize(input, mean, _scale(invstd, weight), bias)
        if count is None:
            ctx.mark_non_differentiable(mean, invstd)
        ctx.save_for_backward(input, weight, mean, invstd, count)
        ctx.group = group
        return output, mean, invstd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, grad_mean, grad_invstd = grads
        input, weight, mean, invstd, count = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        kernel = kernels.reference if torch.is_grad_enabled() else kernels.select(input.device)
        sum_grad, sum_grad_centered = kernel.reduce_grad(grad_output, input, mean)
        grad_weight = sum_grad_centered * invstd if needs_weight else None  # autograd casts to the weight's dtype
        grad_bias = sum_grad if needs_bias else None
        if not needs_input:
            return None, grad_weight, grad_bias, None, None, None, None, None
        scale = _scale(invstd, weight)
        slope = offset = None
        if count is not None:
            grad_mean = grad_mean - scale * sum_grad
            grad_invstd = grad_invstd + _scale(sum_grad_centered, weight)
            grad_mean, grad_invstd = _all_reduce(torch.cat([grad_mean, grad_invstd]), ctx.group).view(2, -1)
            offset = grad_mean / count
            slope = -(invstd**3) * grad_invstd / count
        grad_input = kernel.grad_input(grad_output, input, mean, scale, slope, offset)
        return grad_input, grad_weight, grad_bias, None, None, None, None, None


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
