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
from .communicators import Communicator

__all__ = ["all_reduce", "sum_over_ranks"]


def all_reduce(tensor: Tensor, group: Communicator) -> Tensor:
    """Return the sum over the ranks as a new tensor. In a group of one rank, return the tensor itself.

    Raises:
        RuntimeError: torch.jit.trace, make_fx or torch.export is recording, and would omit the all-reduce.
    """
    if group.size == 1:
        return tensor
    _refuse_recording(group)
    return _AllReduce.apply(tensor, group)  # type: ignore[no-any-return, no-untyped-call]


def sum_over_ranks(tensor: Tensor, group: Communicator, *, followed: bool) -> Tensor:
    """Return the sum over the ranks. The tensor is overwritten unless a transform is active (`followed`)."""
    if group.size == 1:
        return tensor
    return all_reduce(tensor, group) if followed else group.all_reduce(tensor)


def _refuse_recording(group: Communicator) -> None:
    if transforms.recording():
        raise RuntimeError(
            "expected a model without all-reduces to trace or export, got one that shares its statistics "
            f"among {group.size} ranks: call model.eval() or syncnorm.revert_sync_batchnorm(model) first"
        )


class _AllReduce(Function):
    @staticmethod
    def forward(tensor: Tensor, group: Communicator) -> Tensor:
        if transforms.batched(tensor):
            return _summed_as_one(tensor, group)
        return group.all_reduce(tensor.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Communicator], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], ctx.group), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return all_reduce(tangents[0], ctx.group)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], tensor: Tensor, group: Communicator) -> tuple[Tensor, int]:
        return all_reduce(tensor.movedim(in_dims[0], 0), group), 0  # in the same order on every rank


def _summed_as_one(tensor: Tensor, group: Communicator) -> Tensor:
    """Return the sum of a batched gradient of `torch.autograd.grad(..., is_grads_batched=True)`.

    An autograd Function has no vmap rule for this kind of batch. So this function removes the batch axis, sums, and
    adds the axis again.
    """
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    batch = torch._remove_batch_dim(tensor, level, 1, 0)  # (B, *); the size is that of a tensor without the axis
    return torch._add_batch_dim(group.all_reduce(batch.clone(memory_format=torch.contiguous_format)), 0, level)
