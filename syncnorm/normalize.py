"""Normalization by moments that depend on the input, or by constants: the one hand-written backward.

Shapes: input and residual (N, C, *); mask what expands to (N, 1, *); weight, bias (C,); statistics (2, C) = [mean,
invstd]; count (1,).

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

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import kernels
from .communicators import Communicator
from .kernels import PLAIN, Epilogue
from .moments import Moments

__all__ = ["made_by_relu", "normalize", "normalize_by_constants"]


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
    epilogue: Epilogue = PLAIN,
) -> Tensor:
    """Return activation((x - mean) / sqrt(variance + eps) * weight + bias + residual), `moments` being of all inputs.

    With `eps_outside` it divides by sqrt(variance) + eps. Backward issues one all-reduce of 2C float64 (C for moments
    about zero) if the input needs a gradient and the group has more than one rank.
    """
    return _apply(input, moments, weight, bias, eps, group, mask, eps_outside, epilogue)


def normalize_by_constants(
    input: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    epilogue: Epilogue = PLAIN,
) -> Tensor:
    """Return the same for constant mean and variance. No collective."""
    return _apply(input, Moments.constant(mean, variance), weight, bias, eps, None, None, False, epilogue)


def made_by_relu(tensor: Tensor) -> bool:
    """Return whether a tensor is known to be the output of a norm with activation="relu", not changed since."""
    if torch.compiler.is_compiling():
        return False
    node: Any = tensor.grad_fn
    by_us = isinstance(node, _Normalize._backward_cls)
    return by_us and node.activation == "relu" and tensor._version == 0


def _apply(
    input: Tensor,
    moments: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: Communicator | None,
    mask: Tensor | None,
    eps_outside: bool,
    epilogue: Epilogue,
) -> Tensor:
    activation, residual, inplace = epilogue
    options = (mask, moments.centered, eps_outside, activation, inplace)
    return _Normalize.apply(input, weight, bias, residual, moments.values, eps, group, *options)[0]  # type: ignore[no-any-return, no-untyped-call]


class _Normalize(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        moments: Tensor,
        eps: float,
        group: Communicator | None,  # None: the moments are constants
        mask: Tensor | None,
        centered: bool,
        eps_outside: bool,
        activation: str | None,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        epilogue = Epilogue(activation, residual, inplace)
        output, statistics, signs = kernels.select(input).normalize(
            input, moments, weight, bias, eps, eps_outside=eps_outside, epilogue=epilogue
        )
        if inplace:
            ctx.mark_dirty(input)
        if group is None:
            ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        kept = residual if epilogue.keeps_residual else signs
        saved = output if inplace else input
        count = None if group is None else moments[-1:]
        ctx.save_for_backward(saved, weight, bias if epilogue.needs_bias else None, kept, statistics, count, mask)
        ctx.group, ctx.centered, ctx.eps_outside = group, centered, eps if eps_outside else 0.0
        ctx.activation, ctx.inplace = activation, inplace
        return output, statistics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, grad_statistics = grads
        input, weight, bias, kept, statistics, count, mask = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, needs_residual, *others = ctx.needs_input_grad
        kernel = kernels.reference if torch.is_grad_enabled() else kernels.select(input)
        epilogue = Epilogue(ctx.activation, kept, ctx.inplace)
        if grad_output is None:
            grad_output = torch.zeros_like(input)
        arguments = (grad_output, input, statistics, weight, bias)
        sums = weighted = None
        if needs_weight or needs_bias or (needs_input and ctx.group is not None):
            sums, weighted = kernel.reduce_grad(*arguments, mask=mask, epilogue=epilogue)
        if not needs_input or ctx.group is None:
            weighted = None
        else:
            assert weighted is not None
            if grad_statistics is not None:  # of a backward pass through this backward pass
                weighted = weighted + grad_statistics * torch.stack([-1 / statistics[1], statistics[1]])
            weighted = _all_reduce(weighted, ctx.group) if ctx.centered else _second_all_reduced(weighted, ctx.group)
        grad_input, grad_residual = None, grad_output if needs_residual else None
        if needs_input or (needs_residual and kept is not None):
            options = {"centered": ctx.centered, "eps_outside": ctx.eps_outside, "mask": mask, "epilogue": epilogue}
            grad_input, passed = kernel.grad_input(*arguments, weighted, count, **options)
            grad_residual = grad_residual if passed is None else passed
        grad_bias = sums[0] if sums is not None and needs_bias else None  # autograd casts to the parameter's dtype
        grad_weight = sums[1] if sums is not None and needs_weight else None
        return grad_input, grad_weight, grad_bias, grad_residual, *[None] * len(others)


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


def _second_all_reduced(sums: Tensor, group: Communicator) -> Tensor:
    """Return [0, the sum over the ranks of sums[1]]: what moments about zero need."""
    second = _all_reduce(sums[1].clone(), group)
    return torch.stack([torch.zeros_like(second), second])
