"""The sum over the ranks as a differentiable operation, in reverse mode, in forward mode and batched.

The sum is linear. Its adjoint sums the gradients over the ranks, and its derivative sums the tangents over the ranks. A
batch of tensors is summed as one tensor. Each of these is one all-reduce, which all ranks must issue. So the ranks must
agree on which tensors have gradients, tangents and batch axes, and on the size of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import transforms
from .exchange import Exchange
from .kernels import plain

__all__ = ["all_reduce", "recording_error", "sum_over_ranks"]


def all_reduce(tensor: Tensor, exchange: Exchange, *, backward: bool) -> Tensor:
    """Return the sum over the ranks as a new tensor. In a group of one rank, return the tensor itself.

    `backward` tells in which direction of the call of the layer the message is sent.

    Raises:
        RuntimeError: torch.jit.trace, make_fx or torch.export is recording, and would omit the all-reduce.
    """
    if exchange.size == 1:
        return tensor
    if transforms.recording() and not exchange.in_graph:
        raise recording_error(exchange.size)
    return _AllReduce.apply(tensor, exchange, backward)  # type: ignore[no-any-return, no-untyped-call]


def sum_over_ranks(tensor: Tensor, exchange: Exchange, *, backward: bool, followed: bool) -> Tensor:
    """Return the sum over the ranks. The tensor is overwritten unless a transform is active (`followed`)."""
    if exchange.size == 1:
        return tensor
    if followed:
        return all_reduce(tensor, exchange, backward=backward)
    return exchange.all_reduce(tensor, backward=backward)


def recording_error(ranks: int) -> RuntimeError:
    """Return the error for a tracer that would record no all-reduce, or one that the program could not issue."""
    return RuntimeError(
        "expected a model without all-reduces to trace or export, got one that shares its statistics "
        f"among {ranks} ranks: call model.eval() or syncnorm.revert_sync_batchnorm(model) first"
    )


class _AllReduce(Function):
    @staticmethod
    def forward(tensor: Tensor, exchange: Exchange, backward: bool) -> Tensor:
        if transforms.batched(tensor):
            return _summed_as_one(tensor, exchange, backward)
        return exchange.all_reduce(tensor.clone(memory_format=torch.contiguous_format), backward=backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Exchange, bool], output: Tensor) -> None:
        _, ctx.exchange, ctx.in_backward = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return all_reduce(grads[0], ctx.exchange, backward=True), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return all_reduce(tangents[0], ctx.exchange, backward=ctx.in_backward)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None, None], tensor: Tensor, exchange: Exchange, backward: bool
    ) -> tuple[Tensor, int]:
        batch = tensor.movedim(in_dims[0], 0)  # in the same order on every rank
        return all_reduce(batch, exchange, backward=backward), 0


def _summed_as_one(tensor: Tensor, exchange: Exchange, backward: bool) -> Tensor:
    """Return the sum of a batched gradient of `torch.autograd.grad(..., is_grads_batched=True)`.

    An autograd Function has no vmap rule for this kind of batch. So this function removes the batch axis, sums, and
    adds the axis again.
    """
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    batch = plain(tensor).clone(memory_format=torch.contiguous_format)  # (B, *)
    return torch._add_batch_dim(exchange.all_reduce(batch, backward=backward), 0, level)
