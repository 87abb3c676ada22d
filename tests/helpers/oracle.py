"""The oracle: one process normalizes the whole batch in float64. And the same on shards, to hold against it.

Shapes: a shard is (N, C, *) with its own N and *; the whole batch is (positions, C).
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import syncnorm
from syncnorm.testing import CountingCommunicator

CHANNELS = 3
OWN = "activation", "inplace", "reproducible"  # arguments that torch's layer does not have
ACTIVATE = {
    None: lambda z: z,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}


@dataclass(frozen=True)
class Case:
    """A batch, how it is split over the ranks, what counts and what is added, and the layer that it goes through."""

    shapes: tuple  # of each rank's shard
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    mean: float = 0.0  # of the data, whose standard deviation is about 1
    layer: dict = field(default_factory=dict)  # arguments of the layer
    param_dtype: torch.dtype | None = None  # float32 for half-precision data, else that of the data
    steps: int = 1  # training steps, each on new data
    residual: bool = False
    valid: tuple | None = None  # the part of each rank's positions that the mask counts; None: no mask
    mask_dtype: torch.dtype = torch.bool
    mask_has_channel_axis: bool = False  # (N, 1, *) instead of (N, *)

    @property
    def world_size(self):
        """The number of ranks."""
        return len(self.shapes)

    @property
    def activation(self):
        """The name of the activation that the layer applies."""
        return self.layer.get("activation")

    @property
    def inplace(self):
        """Whether the output takes the memory of the input."""
        return self.layer.get("inplace", False)

    def __str__(self):
        words = ["+".join("x".join(map(str, shape)) for shape in self.shapes), str(self.dtype)[6:]]
        words += [] if self.memory_format == torch.contiguous_format else [str(self.memory_format)[6:]]
        words += [f"mean={self.mean:g}"] if self.mean else []
        words += [f"{key}={value}" for key, value in self.layer.items()] + ["residual"] * self.residual
        if self.valid:
            words += ["mask=" + "+".join(f"{part:g}" for part in self.valid), str(self.mask_dtype)[6:]]
            words += ["N1"] * self.mask_has_channel_axis
        return "-".join(words)


class Shard(NamedTuple):
    """What a rank has of a batch. The residual is zero and the mask true where the case has none."""

    x: torch.Tensor
    grad_output: torch.Tensor
    residual: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Result:
    """What a step gives."""

    tensors: list  # y and the gradients of input and, if there is one, residual: of this rank's shard
    grads: dict  # of weight and bias: this rank's share
    buffers: dict


def shard(case, rank, step=0):
    """Return what a rank has. Shards differ in mean and spread, as real ones do; what does not count is far off."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    shape = case.shapes[rank]
    x, grad_output, residual = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    per_channel = torch.arange(1.0, CHANNELS + 1, dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
    x = x * (0.7 + 0.1 * rank + 0.1 * per_channel) + case.mean + 0.3 * rank + 0.1 * per_channel
    mask = torch.ones(shape[0], *shape[2:], dtype=torch.bool)
    if case.valid:
        mask = torch.rand(mask.shape, generator=generator) < case.valid[rank]
        x = torch.where(mask.unsqueeze(1), x, 50 * x)
    if not case.residual:
        residual.zero_()
    tensors = (t.to(case.dtype).contiguous(memory_format=case.memory_format) for t in (x, grad_output, residual))
    return Shard(*tensors, mask)


def parameters(layer):
    """Give the layer parameters that are not all the same."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            values = torch.linspace(0.6, 1.4, CHANNELS) if name == "weight" else torch.linspace(-0.5, 0.5, CHANNELS)
            parameter.copy_(values.to(torch.float32))
    return layer


def result(layer, tensors):
    grads = {name: on_cpu(parameter.grad) for name, parameter in layer.named_parameters()}
    buffers = {name: buffer.clone().cpu() for name, buffer in layer.named_buffers()}
    return Result([on_cpu(t) for t in tensors], grads, buffers)


def on_cpu(t):
    return None if t is None else t.cpu()


class Plain(nn.BatchNorm1d):
    """Torch's BatchNorm of this rank's shard, for any number of axes, then residual and activation."""

    def __init__(self, num_features, process_group, activation=None, inplace=False, reproducible=False, **arguments):
        super().__init__(num_features, **arguments)
        self.activation = activation

    def _check_input_dim(self, input):
        pass

    def forward(self, input, residual=None, mask=None):
        z = super().forward(input)
        return ACTIVATE[self.activation](z if residual is None else z + residual)


def on_shard(case, kind=syncnorm.SyncBatchNorm, masked=True, device="cpu"):
    """Run the case on this rank of the default communicator and return the last step's result, on the CPU."""
    group = CountingCommunicator(syncnorm.communicator())
    dtype = case.param_dtype or (case.dtype if case.dtype == torch.float64 else torch.float32)
    layer = parameters(kind(CHANNELS, dtype=dtype, process_group=group, **case.layer)).to(device)
    for step in range(case.steps):
        x, grad_output, residual, mask = (t.to(device) for t in shard(case, group.rank, step))
        mask = (mask.unsqueeze(1) if case.mask_has_channel_axis else mask).to(case.mask_dtype)
        leaves = [x, residual] if case.residual else [x]
        for leaf in leaves:
            leaf.requires_grad_()
        layer.zero_grad()
        group.calls.clear()
        given = x.clone() if case.inplace else x
        optional = ({"residual": residual} if case.residual else {}) | ({"mask": mask} if case.valid and masked else {})
        y = layer(given, **optional)
        calls_of_forward = len(group.calls)
        y.backward(grad_output)
        if kind is syncnorm.SyncBatchNorm:
            assert (y.data_ptr() == given.data_ptr()) == case.inplace or x.numel() == 0
            each = 0 if group.size == 1 else 2 if layer.reproducible else 1
            assert [calls_of_forward, len(group.calls)] == [each, 2 * each]
            for t in (y, *(leaf.grad for leaf in leaves)):
                assert (t.shape, t.dtype) == (x.shape, case.dtype)
                assert t.is_contiguous(memory_format=case.memory_format)
    return result(layer, [y.detach(), *(leaf.grad for leaf in leaves)])


def in_one_process(case):
    """Return what every rank should have got, by autograd through plain operations on (positions, C).

    Positions that do not count are normalized by the same statistics. What they add to the gradient of these goes to
    the positions that count.
    """
    options = {key: value for key, value in case.layer.items() if key not in OWN}
    layer = parameters(nn.BatchNorm1d(CHANNELS, dtype=torch.float64, **options))
    for step in range(case.steps):
        shards = [shard(case, rank, step) for rank in range(case.world_size)]
        x, grad_output, residual = (rows(tensors) for tensors in list(zip(*shards, strict=True))[:3])
        x.requires_grad_()
        residual.requires_grad_()
        counted = x[torch.cat([s.mask.flatten() for s in shards])]
        layer.zero_grad()
        of_torch = layer(counted.detach())  # for the buffers
        mean, var = counted.mean(0), counted.var(0, correction=0)

        def normalized(x, mean=mean, var=var):
            z = (x - mean) / (var + layer.eps).sqrt()
            z = z if layer.weight is None else z * layer.weight
            return z if layer.bias is None else z + layer.bias

        torch.testing.assert_close(normalized(counted), of_torch)
        y = ACTIVATE[case.activation](normalized(x) + residual)
        y.backward(grad_output)
    whole = result(layer, [y.detach(), x.grad, residual.grad][: 2 + case.residual])
    of_ranks = zip(*(cut(tensor, shards) for tensor in whole.tensors), strict=True)
    return [Result(list(tensors), whole.grads, whole.buffers) for tensors in of_ranks]


def rows(tensors):
    """Return shards (N, C, *) as one tensor (positions, C) in float64."""
    return torch.cat([t.double().movedim(1, -1).reshape(-1, CHANNELS) for t in tensors])


def cut(whole, shards):
    """Return a tensor (positions, C) as shards (N, C, *)."""
    parts = whole.split([s.mask.numel() for s in shards])
    return [p.view(s.x.movedim(1, -1).shape).movedim(-1, 1) for p, s in zip(parts, shards, strict=True)]


def tolerance(dtype, mean=0.0):
    """Return the largest error, relative to the largest value, that the dtype and the mean of the data allow."""
    if dtype == torch.float64:
        return 1e-12 * max(1.0, mean**2 * 1e-4)  # moments of float64 data: mean² digits are lost on the wire
    if dtype == torch.float32:
        return 5e-4 if mean > 1e4 else 2e-6
    return torch.finfo(dtype).eps


def assert_close(actual, expected, case, scale=1.0):
    """Compare with the oracle, relative to the largest value."""
    expected = expected.double()
    largest = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    bound = tolerance(case.dtype, case.mean) * scale * largest
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)


def assert_matches(results, case):
    """Compare the results of all ranks with the oracle's, and the running statistics of the ranks bit by bit."""
    scale = 8 if case.inplace and case.dtype.itemsize <= 4 else 1  # the input is had from an output that was rounded
    expected = in_one_process(case)
    for result, wanted in zip(results, expected, strict=True):
        for actual, tensor in zip(result.tensors, wanted.tensors, strict=True):
            assert_close(actual, tensor, case, scale)
        assert result.buffers.keys() == wanted.buffers.keys()
        for name, buffer in result.buffers.items():
            assert torch.equal(buffer, results[0].buffers[name]), f"{name} differs between ranks"
            assert_close(buffer, wanted.buffers[name], case)
    for name, grad in expected[0].grads.items():
        assert_close(sum(result.grads[name].double() for result in results), grad, case, scale)
