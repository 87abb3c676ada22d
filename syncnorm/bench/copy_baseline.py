"""The unit of the benchmarks: torch's own copies of as much memory as a layer reads and writes, and bare all-reduces.

A layer reads its input twice and writes y in forward, reads input and dy twice and writes dx in backward. These are 8
passes over tensors of the input's size. The copy baseline makes 4 copies, which read and write one tensor each.

It is a yardstick and not a lower bound: a layer may take less time. It writes two tensors where the copies write four,
and a read costs less than a write. Its second pass can go backwards, so that it first meets the blocks that the first
pass left in the cache. It can write large results past the caches. The copies do none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..communicators import communicator

__all__ = ["LAYER_PASSES", "PASSES", "all_reduce", "layer", "layer_in_autograd"]

LAYER_PASSES = 8  # tensors that `layer` reads or writes


def layer(input: Tensor, all_reduces: Sequence[Callable[[], object]] = ()) -> Callable[[], object]:
    """Return what moves as much memory as forward and backward of a layer: 2 clones and 2 copies of the input.

    Args:
        input: (N, C, *).
        all_reduces: those of forward and backward, each to be called where a layer does: between two passes.
    """
    input = input.detach()
    there = torch.empty_like(input)
    forward, backward = all_reduces or (lambda: None, lambda: None)

    def run() -> tuple[Tensor, Tensor]:
        there.copy_(input)
        forward()
        y = input.clone()
        there.copy_(input)
        backward()
        return y, input.clone()  # y lives until backward has dx

    return run


def layer_in_autograd(input: Tensor, parameters: Sequence[Tensor], grad_output: Tensor) -> Callable[[], object]:
    """Return what moves the same memory in forward and backward of an `autograd.Function`, and does nothing else.

    The difference to `layer` is the time that torch takes to call such a Function and its backward.
    """
    inputs = [input, *parameters]
    there = torch.empty_like(input)

    def run() -> tuple[Tensor, ...]:
        fresh = _Copy.apply(there, *inputs)  # type: ignore[no-untyped-call]
        return (fresh, *torch.autograd.grad(fresh, inputs, grad_output))

    return run


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, there: Tensor, input: Tensor, *parameters: Tensor) -> Tensor:
        ctx.there = there
        ctx.save_for_backward(input, *parameters)
        there.copy_(input)
        return input.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, *parameters = ctx.saved_tensors
        ctx.there.copy_(input)
        return None, input.clone(), *map(torch.empty_like, parameters)


def _read_one(x: Tensor, _: Tensor) -> object:
    return _memory(x).sum()


def _read_one_write(x: Tensor, _: Tensor) -> object:
    return x.clone()


def _read_two(x: Tensor, dy: Tensor) -> object:
    return torch.dot(_memory(x), _memory(dy))


def _read_two_write(x: Tensor, dy: Tensor) -> object:
    return _memory(x) + _memory(dy)


PASSES: dict[str, Callable[[Tensor, Tensor], object]] = {  # by kernel: the same traffic, given x and dy
    "moments": _read_one,
    "normalize": _read_one_write,
    "reduce_grad": _read_two,
    "grad_input": _read_two_write,
}


def all_reduce(tensor: Tensor) -> Callable[[], object]:
    """Return what sums `tensor` in place over the ranks of the job, without anything of syncnorm in between.

    That is mpi4py's `Allreduce`, or torch.distributed's; of CUDA tensors over MPI the communicator's, which knows
    whether they have to travel through the host.
    """
    if dist.get_backend() != "mpi4py":
        return lambda: dist.all_reduce(tensor)
    if tensor.is_cuda:
        return lambda: communicator().all_reduce(tensor)
    from ..mpi.library import MPI

    # The quickest spelling: mpi4py need not look for the datatype, and the list is made once.
    memory = [tensor.numpy(), {torch.float64: MPI.DOUBLE, torch.float32: MPI.FLOAT}[tensor.dtype]]
    return lambda: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, memory)


def _memory(tensor: Tensor) -> Tensor:
    """Return the memory of a dense tensor as float32, whatever its layout and dtype: torch reads that at full speed."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.float32)
