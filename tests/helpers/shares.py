"""Functions of whole tensors that each rank computes on its own share: what gradcheck can check across ranks."""

import torch

import syncnorm
from syncnorm.all_reduce import all_reduce
from syncnorm.exchange import Exchange


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
        return all_reduce(x, Exchange(syncnorm.communicator()), backward=False).clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return Enter.apply(grad)

    @staticmethod
    def jvp(ctx, tangent):
        return Leave.apply(tangent)


SIZES = {1: (4,), 2: (3, 1), 3: (2, 0, 1), 4: (1, 1, 1, 1)}


def on_the_whole_batch(sizes, function):
    """Return a function of the whole batch and the parameters, alike on all ranks, that works on shards."""
    rank = syncnorm.communicator().rank
    start, stop = sum(sizes[:rank]), sum(sizes[: rank + 1])

    def sharded(x, weight, bias):
        x, weight, bias = Enter.apply(x), Enter.apply(weight), Enter.apply(bias)
        y = function(x[start:stop], weight, bias)
        return Leave.apply(torch.cat([torch.zeros_like(x[:start]), y, torch.zeros_like(x[stop:])]))

    return sharded


def arguments(sizes):
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), 2, 3, dtype=torch.float64) + 2
    weight, bias = torch.tensor([0.7, 1.5]).double(), torch.tensor([-0.3, 0.4]).double()
    return [t.requires_grad_() for t in (x, weight, bias)]
