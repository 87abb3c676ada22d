"""Normalization by moments that depend on the input, or by constants: the one hand-written backward.

Shapes: input and residual (N, C, *); mask what expands to (N, 1, *); weight, bias (C,); statistics (2C + 1,) = [mean,
invstd, count]; sums (2, C).

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

from . import kernels, transforms
from .all_reduce import all_reduce
from .arguments import memory_of
from .communicators import Communicator
from .kernels import PLAIN, Epilogue
from .kernels.layout import channels_last
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
    return by_us and node.plan.epilogue.activation == "relu" and tensor._version == 0


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
    if moments.followed:
        return _composed(input, moments.values, weight, bias, eps, eps_outside, epilogue)
    residual = epilogue.residual
    plan = _Plan(eps, group, mask, moments.centered, eps_outside, _with(epilogue, None))
    written = memory_of(input) if epilogue.inplace else input
    output = _Normalize.apply(written, weight, bias, residual, moments.values, plan)[0]  # type: ignore[no-untyped-call]
    return output if written is input else input


def _composed(
    input: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    eps_outside: bool,
    epilogue: Epilogue,
) -> Tensor:
    """Return y by torch's own operations, through which the derivatives go to the moments and so to the input."""
    residual, reference = epilogue.residual, kernels.reference
    z, _ = reference.preactivation(input, moments, weight, bias, eps, eps_outside=eps_outside, residual=residual)
    y = reference.activate(z, epilogue.activation).to(input.dtype)
    return input.copy_(y) if epilogue.inplace else y


def _with(epilogue: Epilogue, residual: Tensor | None) -> Epilogue:
    return epilogue if residual is epilogue.residual else epilogue._replace(residual=residual)


class _Plan(NamedTuple):
    """What a normalization does, but for the tensors that autograd follows."""

    eps: float
    group: Communicator | None  # None: the moments are constants
    mask: Tensor | None
    centered: bool
    eps_outside: bool
    epilogue: Epilogue  # without the residual


class _Normalize(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        moments: Tensor,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor]:
        epilogue, constant = _with(plan.epilogue, residual), plan.group is None
        output, statistics, signs = kernels.select(input, moments, weight, bias, residual).normalize(
            input, moments, weight, bias, plan.eps, eps_outside=plan.eps_outside, epilogue=epilogue
        )
        if epilogue.inplace:
            ctx.mark_dirty(input)
        if constant:
            ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            output if epilogue.inplace else input,
            statistics,
            weight,
            bias if epilogue.needs_bias else None,
            residual if epilogue.keeps_residual else signs,
            plan.mask,
        )
        ctx.dtype = _common_dtype(weight, bias)
        if signs is not None:
            ctx.channels_last = channels_last(input)
        ctx.plan = plan._replace(mask=None) if plan.mask is not None else plan
        return output, statistics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, grad_statistics = grads
        input, statistics, weight, bias, kept, mask = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        plan = ctx.plan
        followed = torch.is_grad_enabled() or transforms.active(grad_output, grad_statistics)
        tensors = input, grad_output, statistics, weight, bias, kept, mask
        kernel = kernels.reference if followed else kernels.select(*tensors)
        epilogue = _with(plan.epilogue, kept)
        if epilogue.keeps_signs and bool(channels_last(input)) != bool(ctx.channels_last):
            # The signs are in the order of its memory, and a hook such as `save_on_cpu` has laid it out anew.
            input = input.movedim(1, -1).contiguous().movedim(-1, 1) if ctx.channels_last else input.contiguous()
        if grad_output is None:
            grad_output = torch.zeros_like(input)
        backward = kernel.Backward(grad_output, input, statistics, weight, bias, mask=mask, epilogue=epilogue)
        through_statistics = needs_input and plan.group is not None
        summed = grad_weight = grad_bias = grad_input = None
        if through_statistics or needs_weight or needs_bias:
            grad_weight, grad_bias, sums = backward.reduce_grad(ctx.dtype)
            if through_statistics:
                if grad_statistics is not None:  # of a backward pass through this backward pass
                    sums = sums + _sums_of(grad_statistics, statistics)
                summed = (_all_reduced if plan.centered else _second_all_reduced)(sums, plan.group, followed)
        grad_residual = grad_output if needs_residual else None
        if needs_input or (needs_residual and kept is not None):
            eps_outside = plan.eps if plan.eps_outside else 0.0
            grad_input, passed = backward.grad_input(summed, centered=plan.centered, eps_outside=eps_outside)
            grad_residual = grad_residual if passed is None else passed
        return (
            grad_input,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            grad_residual,
            None,
            None,
        )


def _common_dtype(weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    """Return a dtype that holds the gradients of both; autograd gives each its own."""
    if weight is None:
        return torch.float64 if bias is None else bias.dtype
    if bias is None or bias.dtype == weight.dtype:
        return weight.dtype
    return torch.promote_types(weight.dtype, bias.dtype)


def _sums_of(grad_statistics: Tensor, statistics: Tensor) -> Tensor:
    """Return what a gradient with respect to mean and invstd adds to the sums; the count is a constant."""
    _, invstd = statistics[:-1].view(2, -1)
    return grad_statistics[:-1].view(2, -1) * torch.stack([-1 / invstd, invstd])


def _all_reduced(sums: Tensor, group: Communicator, followed: bool) -> Tensor:
    """Return the sum over the ranks, in the memory of this rank's unless operations are followed."""
    if followed:
        return all_reduce(sums, group)
    return sums if group.size == 1 else group.all_reduce(sums)


def _second_all_reduced(sums: Tensor, group: Communicator, followed: bool) -> Tensor:
    """Return [0, the sum over the ranks of sums[1]]: what moments about zero need."""
    second = _all_reduced(sums[1].clone(), group, followed)
    return torch.stack([torch.zeros_like(second), second])
