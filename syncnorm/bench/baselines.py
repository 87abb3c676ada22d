"""What others do, to be timed beside: each takes x, (N, C, *), and normalizes by the statistics of all ranks.

Shapes: weight, bias and running statistics (C,).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules._functions import SyncBatchNorm as TorchFunction

from ..communicators import Communicator
from ..kernels import reference

__all__ = ["TorchSyncBatchNorm", "batch_norm_kernels", "compiled", "composition", "fairscale", "has_torch_group"]

Forward = Callable[[Tensor], Tensor]


class _AllReduce(Function):
    """The sum over the ranks, differentiable: its adjoint is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Communicator) -> Tensor:
        ctx.group = group
        return group.all_reduce(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_reduce(grads[0].clone()), None


def composition(norm: nn.BatchNorm2d, group: Communicator) -> Forward:
    """Return synchronized BatchNorm composed of torch's operations and one differentiable all-reduce.

    It is the way of detectron2's NaiveSyncBatchNorm and of fairscale: the mean and the mean of squares in the dtype of
    the input, averaged over the ranks, the variance as their difference, and autograd for all of the backward.
    """

    def forward(x: Tensor) -> Tensor:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        means = torch.cat([x.mean(axes), x.square().mean(axes)])  # (2C,)
        mean, mean_square = (_AllReduce.apply(means, group) / group.size).chunk(2)  # type: ignore[no-untyped-call]
        variance = mean_square - mean.square()
        with torch.no_grad():
            for running, batch in ((norm.running_mean, mean), (norm.running_var, variance)):
                assert running is not None
                running.lerp_(batch.to(running.dtype), 0.1)
        scale = norm.weight * (variance + norm.eps).rsqrt()
        per_channel = [1, -1, *[1] * (x.dim() - 2)]
        shift = norm.bias - mean * scale
        y: Tensor = x * scale.to(x.dtype).view(per_channel) + shift.to(x.dtype).view(per_channel)
        return y

    return forward


def fairscale(norm: nn.BatchNorm2d) -> nn.Module | None:
    """Return fairscale's SyncBatchNorm for the layer's channels, if fairscale is installed."""
    try:
        module = importlib.import_module("fairscale.experimental.nn")
    except ImportError:
        return None
    made: nn.Module = module.SyncBatchNorm(norm.num_features)
    return made.to(norm.weight.device)


class TorchSyncBatchNorm(nn.BatchNorm2d):
    """What torch.nn.SyncBatchNorm runs in training on a GPU, also for a group of one, for which torch's does not.

    It calls the autograd function of torch.nn.SyncBatchNorm with torch.distributed's default group. So it has the
    function's kernels, its all-gather and all-reduce, and its synchronization with the host.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *) -> (N, C, *)."""
        arguments = (self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum)
        return TorchFunction.apply(input, *arguments, dist.group.WORLD, dist.get_world_size())  # type: ignore[no-any-return, no-untyped-call]


def has_torch_group() -> bool:
    """Return whether torch.distributed has a default group whose backend has collectives for CUDA tensors."""
    return dist.is_initialized() and dist.get_backend() in ("nccl", "gloo")


def batch_norm_kernels(norm: nn.BatchNorm2d, x: Tensor) -> str:
    """Return whose kernels F.batch_norm runs on x in training: "cudnn", "native" or "miopen". torch chooses them."""
    state = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return str(torch._C._select_batch_norm_backend(x, *state, True, norm.eps).name).lower()


def compiled(norm: nn.BatchNorm2d) -> Forward:
    """Return the reference kernels, compiled by torch for forward and backward. One rank: it has no collective."""

    @torch.compile(fullgraph=True)
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.normalize(x, reference.moments(x), weight, bias, None, norm.eps)[0]

    def run(x: Tensor) -> Tensor:
        return forward(x, norm.weight, norm.bias)

    return run
