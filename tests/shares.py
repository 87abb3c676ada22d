"""Functions of whole tensors that each rank computes on its own share: what gradcheck can check across ranks."""

import torch

import syncnorm
from syncnorm.all_reduce import all_reduce


class Enter(torch.autograd.Function):
    """A tensor that all ranks hold alike, used by each for its own share: identity; the adjoint sums the shares."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return Leave.apply(grad)

    @staticmethod
    def jvp(ctx, tangent):
        return tangent.clone()


class Leave(torch.autograd.Function):
    """Shares that sum to a tensor that all ranks hold alike. The adjoint of Enter, as Enter is of it."""

    @staticmethod
    def forward(x):
        return all_reduce(x, syncnorm.communicator()).clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return Enter.apply(grad)

    @staticmethod
    def jvp(ctx, tangent):
        return Leave.apply(tangent)
