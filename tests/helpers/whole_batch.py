"""The oracle: one process normalizes the whole batch in float64. And the same on shards, to hold against it.

Shapes: a shard is (N, C, *) with its own N and *; the whole batch is (positions, C).
"""

from dataclasses import dataclass, field

import torch
from torch import nn

import syncnorm

CHANNELS = 3


@dataclass(frozen=True)
class Case:
    """A batch, how it is split over the ranks, and the layer that it goes through."""

    shapes: tuple  # of each rank's shard
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    mean: float = 0.0  # of the data, whose standard deviation is about 1
    layer: dict = field(default_factory=dict)  # arguments of the layer
    param_dtype: torch.dtype | None = None  # float32 for half-precision data, else that of the data
    steps: int = 1  # training steps, each on new data

    @property
    def world_size(self):
        """The number of ranks."""
        return len(self.shapes)

    def __str__(self):
        words = ["+".join("x".join(map(str, shape)) for shape in self.shapes), str(self.dtype)[6:]]
        words += [] if self.memory_format == torch.contiguous_format else [str(self.memory_format)[6:]]
        words += [f"mean={self.mean:g}"] if self.mean else []
        words += [f"{key}={value}" for key, value in self.layer.items()]
        return "-".join(words)


@dataclass(frozen=True)
class Result:
    """What a step gives: y and the input gradient of each rank's shard, and what belongs to the layer."""

    y: torch.Tensor
    grad_input: torch.Tensor
    grads: dict  # of weight and bias: this rank's share
    buffers: dict


def shard(case, rank, step):
    """Return input and upstream gradient of a rank. Shards differ in mean and spread, as real ones do."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    shape = case.shapes[rank]
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    per_channel = torch.arange(1.0, CHANNELS + 1, dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
    x = x * (0.7 + 0.1 * rank + 0.1 * per_channel) + case.mean + 0.3 * rank + 0.1 * per_channel
    grad_output = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (t.to(case.dtype).contiguous(memory_format=case.memory_format) for t in (x, grad_output))


def parameters(layer):
    """Give the layer parameters that are not all the same."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            values = torch.linspace(0.6, 1.4, CHANNELS) if name == "weight" else torch.linspace(-0.5, 0.5, CHANNELS)
            parameter.copy_(values.to(torch.float32))
    return layer


def result(layer, x, y):
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    return Result(y.detach(), x.grad, grads, buffers)


def on_shard(case, kind):
    """Run the case on this rank of the default communicator and return the last step's result."""
    group = syncnorm.communicator()
    dtype = case.param_dtype or (case.dtype if case.dtype == torch.float64 else torch.float32)
    layer = parameters(kind(CHANNELS, dtype=dtype, **case.layer))
    for step in range(case.steps):
        x, grad_output = shard(case, group.rank, step)
        layer.zero_grad()
        x.requires_grad_()
        y = layer(x)
        y.backward(grad_output)
        assert y.dtype == x.grad.dtype == case.dtype
        for t in (y, x.grad):
            assert t.shape == x.shape
            assert t.is_contiguous(memory_format=case.memory_format)
    return result(layer, x, y)


def in_one_process(case):
    """Return what every rank should have got: the oracle's results, its y and input gradient cut to the shards."""
    layer = parameters(nn.BatchNorm1d(CHANNELS, dtype=torch.float64, **case.layer))
    for step in range(case.steps):
        shards = [list(shard(case, rank, step)) for rank in range(len(case.shapes))]
        x, grad_output = (
            torch.cat([s[i].double().movedim(1, -1).reshape(-1, CHANNELS) for s in shards]) for i in (0, 1)
        )
        layer.zero_grad()
        x.requires_grad_()
        y = layer(x)
        y.backward(grad_output)
    whole = result(layer, x, y)
    sizes = [s[0].numel() // CHANNELS for s in shards]

    def cut(t):
        parts = t.split(sizes)
        return [p.view(s[0].movedim(1, -1).shape).movedim(-1, 1) for p, s in zip(parts, shards, strict=True)]

    return [
        Result(y, grad_input, whole.grads, whole.buffers)
        for y, grad_input in zip(cut(whole.y), cut(whole.grad_input), strict=True)
    ]


def assert_close(actual, expected, case, scale=1.0):
    """Compare with the oracle, relative to the largest value, as exactly as the dtype and the data's mean allow."""
    if case.dtype == torch.float64:
        tolerance = 1e-12 * max(1.0, case.mean**2 * 1e-4)  # moments of float64 data: mean² digits are lost on the wire
    elif case.dtype == torch.float32:
        tolerance = 5e-4 if case.mean > 1e4 else 2e-6
    else:
        tolerance = torch.finfo(case.dtype).eps
    expected = expected.double()
    largest = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * scale * largest)


def assert_matches(results, case):
    """Compare the results of all ranks with the oracle's, and the running statistics of the ranks bit by bit."""
    for actual, expected in zip(results, in_one_process(case), strict=True):
        assert_close(actual.y, expected.y, case)
        assert_close(actual.grad_input, expected.grad_input, case)
        assert actual.buffers.keys() == expected.buffers.keys()
        for name, buffer in actual.buffers.items():
            assert torch.equal(buffer, results[0].buffers[name]), f"{name} differs between ranks"
            assert_close(buffer, expected.buffers[name], case)
    for name, grad in in_one_process(case)[0].grads.items():
        assert_close(sum(actual.grads[name].double() for actual in results), grad, case)
