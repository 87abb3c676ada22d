"""What a layer computes on a device, at real sizes, against plain operations in float64.

Shapes: x, residual, dy (N, C, *); mask (N, 1, *) or None; weight, bias (C,).
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from accelerator import DEVICE, needs_device, needs_memory, size
from oracle import ACTIVATE
from torch import nn
from worst import check, error

import syncnorm
from syncnorm.functional import sync_batch_norm

pytestmark = needs_device
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of axes
LARGEST_ON_THE_CPU = 2**22  # values; the oracle of more is computed on the device
KINK = 1e-3  # around 0, where rounding decides on the gradient of relu and leaky_relu


class Case(NamedTuple):
    """A batch, and the layer that it goes through."""

    shape: tuple
    dtype: torch.dtype
    activation: str | None = None
    residual: bool = False
    mask: torch.dtype | None = None
    inplace: bool = False
    channels_last: bool = False
    momentum: float | None = 0.1
    affine: bool = True

    def __str__(self):
        words = ["x".join(map(str, self.shape)), str(self.dtype)[6:], self.activation or "linear"]
        words += [f"mask={str(self.mask)[6:]}"] * (self.mask is not None)
        return "-".join(words + [name for name in ("residual", "inplace", "channels_last") if getattr(self, name)])


class Data(NamedTuple):
    """What goes through the layer."""

    x: torch.Tensor
    residual: torch.Tensor | None
    mask: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor


F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
STAGE = size((32, 256, 56, 56), (3, 16, 5, 8))
STEM = size((64, 64, 112, 112), (2, 8, 6, 7))
ODD = size((7, 19, 37, 41), (3, 5, 3, 7))
ROWS = size((4096, 1000), (9, 5))
VOLUME = size((2, 33, 9, 30, 31), (2, 3, 2, 3, 2))
ONE_CHANNEL = size((8, 1, 225, 223), (3, 1, 7, 5))
DEEP = size((2, 2048, 7, 7), (2, 24, 2, 2))
LONG = size((1, 2, 2**22 + 5), (1, 2, 1200))
CASES = [
    Case(STAGE, F32),
    Case(STEM, BF16, "relu"),
    Case(STAGE, BF16, "relu", residual=True, channels_last=True),
    Case(ODD, F32, "relu", residual=True, mask=torch.bool),
    Case(ODD, F16, "silu", residual=True, channels_last=True),
    Case(ROWS, F32, "gelu_tanh"),
    Case(ROWS, F64, "leaky_relu", inplace=True),
    Case(VOLUME, F64, "silu", residual=True, mask=F32, channels_last=True),
    Case(ONE_CHANNEL, F32, "leaky_relu", momentum=None),
    Case(ONE_CHANNEL, BF16, mask=F32),
    Case(DEEP, F32, "leaky_relu", inplace=True, channels_last=True),
    Case(STAGE, F16, inplace=True),
    Case(LONG, F32, "leaky_relu", residual=True),
    Case(ODD, F16, "gelu_tanh", residual=True, mask=torch.bool, affine=False),
]


def random(shape, dtype, seed, channels_last=False):
    """Return normal values on the device, of one generator for each seed."""
    t = torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)
    return t.contiguous(memory_format=CHANNELS_LAST[t.dim()]) if channels_last else t


def data(case):
    """Return data whose channels differ in mean and spread. What the mask does not count is far off."""
    channels, axes = case.shape[1], [1] * (len(case.shape) - 2)
    steps = torch.linspace(0.5, 1.5, channels, device=DEVICE)
    x = random(case.shape, F32, 0) * steps.view(-1, *axes) + 2 * steps.flip(0).view(-1, *axes)
    mask = None
    if case.mask is not None:
        kept = torch.rand(case.shape[0], 1, *case.shape[2:], device=DEVICE)
        mask = kept > 0.3 if case.mask == torch.bool else torch.where(kept > 0.3, kept, 0).to(case.mask)
        x = torch.where(kept > 0.3, x, 5 * x)
    x = x.to(case.dtype)
    if case.channels_last:
        x = x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
    residual = random(case.shape, case.dtype, 1, case.channels_last) if case.residual else None
    return Data(x, residual, mask, steps.sqrt(), steps - 1)


class Oracle:
    """The layer by plain operations in float64. `forward` has to come before `backward`."""

    def __init__(self, case, batch):
        place = "cpu" if batch.x.numel() <= LARGEST_ON_THE_CPU else DEVICE
        x, residual, weights, weight, bias = (None if t is None else t.to(place, torch.float64) for t in batch)
        self.case = case
        self.leaves = {"dx": x, "dresidual": residual} | ({"dweight": weight, "dbias": bias} if case.affine else {})
        self.leaves = {name: t.requires_grad_() for name, t in self.leaves.items() if t is not None}
        self.weights = torch.ones_like(x[:, :1]) if weights is None else weights

    def forward(self):
        """Return y, and the mean and unbiased variance that the running statistics move towards."""
        x, case = self.leaves["dx"], self.case
        axes = [0, *range(2, x.dim())]
        n = self.weights.sum()
        mean = (x * self.weights).sum(axes, keepdim=True) / n
        m2 = ((x - mean).square() * self.weights).sum(axes, keepdim=True)
        self.z = (x - mean) / (m2 / n + 1e-5).sqrt()
        if case.affine:
            per_channel = (-1, *[1] * (x.dim() - 2))
            self.z = self.z * self.leaves["dweight"].view(per_channel) + self.leaves["dbias"].view(per_channel)
        self.z = self.z + self.leaves.get("dresidual", 0)
        self.y = ACTIVATE[case.activation](self.z)
        return self.y.detach(), mean.detach().flatten(), (m2 / (n - 1)).detach().flatten()

    def backward(self, dy):
        """Return the gradients of the leaves by their names."""
        grads = torch.autograd.grad(self.y, list(self.leaves.values()), dy.to(self.y.device, torch.float64))
        return dict(zip(self.leaves, grads, strict=True))


def on_device(layer, batch, dy, inplace=False):
    """Return y and the gradients of a training step of the layer, by their names."""
    leaves = {"dx": batch.x, "dresidual": batch.residual, "dweight": layer.weight, "dbias": layer.bias}
    leaves = {name: t.requires_grad_() for name, t in leaves.items() if t is not None}
    options = {"residual": batch.residual, "mask": batch.mask}
    y = layer(batch.x.clone() if inplace else batch.x, **{name: t for name, t in options.items() if t is not None})
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return y.detach(), dict(zip(leaves, grads, strict=True))


def bound_of(name, case):
    """Return the largest error of y or a gradient, relative to the largest value."""
    if case.dtype == F64:
        return 1e-12
    if name in ("dweight", "dbias") and not case.inplace:  # are float32; of long sums that nearly cancel
        return 1e-5
    return (2e-6 if case.dtype == F32 else torch.finfo(case.dtype).eps) * (8 if case.inplace else 1)


def make_layer(case, batch, **options):
    """Return the layer of a case, with the parameters of the batch."""
    dtype = F64 if case.dtype == F64 else F32
    layer = syncnorm.SyncBatchNorm(
        case.shape[1], momentum=case.momentum, affine=case.affine, activation=case.activation, inplace=case.inplace,
        device=DEVICE, dtype=dtype, **options,
    )  # fmt: skip
    if case.affine:
        with torch.no_grad():
            layer.weight.copy_(batch.weight)
            layer.bias.copy_(batch.bias)
    return layer


def check_case(record_property, case, layer, batch):
    """Compare a training step of the layer with the oracle: y, gradients, buffers, memory formats."""
    oracle = Oracle(case, batch)
    expected_y, mean, var = oracle.forward()
    dy = random(case.shape, case.dtype, 2, case.channels_last)
    if case.activation in ("relu", "leaky_relu"):
        dy = torch.where((oracle.z.detach().abs() < KINK).to(DEVICE), 0, dy)
    y, grads = on_device(layer, batch, dy, case.inplace)
    dtype = str(case.dtype)[6:] + " in place" * case.inplace
    for name, actual, expected in (("y", y, expected_y), *((n, grads[n], t) for n, t in oracle.backward(dy).items())):
        check(record_property, f"{name}, {dtype}", actual, expected, bound_of(name, case))
    for t in (y, *(grads[name] for name in ("dx", "dresidual") if name in grads)):
        assert t.dtype == case.dtype
        assert t.stride() == batch.x.stride()
    momentum = 1.0 if case.momentum is None else case.momentum
    bound = 1e-12 if case.dtype == F64 else 2e-6
    for name, before, moved in (("running_mean", 0.0, mean), ("running_var", 1.0, var)):
        expected = (1 - momentum) * before + momentum * moved
        check(record_property, f"{name}, {dtype}", getattr(layer, name), expected, bound)
    assert layer.num_batches_tracked.item() == 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layer_computes_what_float64_does(record_property, case):
    batch = data(case)
    check_case(record_property, case, make_layer(case, batch), batch)


class OfAShard(nn.BatchNorm2d):
    """Torch's BatchNorm by the statistics of the first samples, as if they were all."""

    def forward(self, x):
        y = super().forward(x[: len(x) - 1])
        return torch.cat([y, F.batch_norm(x[-1:], None, None, self.weight, self.bias, training=True)])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_statistics_of_a_shard_do_not(dtype):
    """The negative control."""
    case = Case(ODD, dtype)
    batch = data(case)
    layer = OfAShard(case.shape[1], device=DEVICE)
    layer.load_state_dict(make_layer(case, batch).state_dict())
    with pytest.raises(AssertionError, match="expected an error of at most"):
        check_case(lambda *_: None, case, layer, batch)


@pytest.mark.parametrize(("ratio", "bound"), [(0, 2e-6), (1e3, 2e-6), (1e4, 2e-6), (1e6, 5e-4)])
def test_a_large_mean_costs_no_digits(record_property, ratio, bound):
    shape = size((32, 16, 56, 56), (4, 2, 6, 50))
    x = (random(shape, F32, 0) + ratio).requires_grad_()
    dy = random(shape, F32, 1)
    layer = syncnorm.SyncBatchNorm(shape[1], device=DEVICE)
    exact = x.detach().cpu().double().requires_grad_()
    weight, bias = (t.detach().cpu().double().requires_grad_() for t in (layer.weight, layer.bias))
    expected = F.batch_norm(exact, None, None, weight, bias, training=True)
    expected_grads = torch.autograd.grad(expected, (exact, weight, bias), dy.cpu().double())
    y = layer(x)
    grads = torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
    of_torch = F.batch_norm(x.detach(), None, None, training=True)
    record_property(f"error: y of F.batch_norm, mean/std {ratio:g}", error(of_torch, expected, absolute=True))
    check(record_property, f"y, mean/std {ratio:g}", y, expected, bound, absolute=True)
    for name, actual, wanted in zip(("dx", "dweight", "dbias"), grads, expected_grads, strict=True):
        check(record_property, f"{name}, mean/std {ratio:g}", actual, wanted, bound)


def test_a_mean_in_float32_would_cost_them():
    """The negative control: what is left of float32 data if the mean is rounded to float32."""
    x = random((4, 2, 600), F32, 0) + 1e4
    exact = x.double()
    expected = exact - exact.mean((0, 2), keepdim=True)
    rounded = x - exact.mean((0, 2), keepdim=True).float()
    assert error(rounded, expected, absolute=True) > 2e-6


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(0, 64, 7, 7), (0, 5), (3, 4, 0)], ids=str)
def test_an_empty_batch_leaves_the_statistics(shape, dtype):
    layer = syncnorm.SyncBatchNorm(shape[1], activation="relu", device=DEVICE)
    x = torch.empty(shape, device=DEVICE, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.backward(torch.empty_like(y))
    assert (y.shape, x.grad.shape, y.dtype) == (shape, shape, dtype)
    assert layer.num_batches_tracked.item() == 0
    for t, value in ((layer.running_mean, 0), (layer.running_var, 1), (layer.weight.grad, 0), (layer.bias.grad, 0)):
        assert t.tolist() == [value] * shape[1]


def leaves():
    """Return x, weight, bias and residual in float64."""
    shapes = [(3, 2, 2), (2,), (2,), (3, 2, 2)]
    return [random(shape, F64, seed).requires_grad_() for seed, shape in enumerate(shapes)]


def plain(x, weight, bias):
    return sync_batch_norm(x, None, None, weight, bias, training=True)


def with_everything(x, weight, bias, residual):
    mask = torch.arange(6, device=DEVICE).view(3, 1, 2) % 5 > 0
    options = {"activation": "silu", "residual": residual, "mask": mask}
    return sync_batch_norm(x, None, None, weight, bias, training=True, **options)


def without_a_term(x, weight, bias):
    """Return what `plain` does, with another gradient of x."""
    return plain(x, weight, bias) + (x - x.detach())


FAST = size(False, True)  # fewer finite differences


@pytest.mark.parametrize(("function", "count"), [(plain, 3), (with_everything, 4)])
def test_gradients_are_those_of_finite_differences(function, count):
    assert torch.autograd.gradcheck(function, leaves()[:count], fast_mode=FAST)


def test_second_derivatives_are_those_of_finite_differences():
    assert torch.autograd.gradgradcheck(with_everything, leaves(), fast_mode=FAST)


def test_finite_differences_see_another_gradient():
    """The negative control."""
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(without_a_term, leaves()[:3], fast_mode=FAST)


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_results_are_the_same_bits_at_each_run(channels_last, dtype):
    case = Case(size((16, 24, 14, 14), (3, 8, 3, 5)), dtype, "relu", residual=True, channels_last=channels_last)
    batch = data(case)
    layer, dy = make_layer(case, batch), random(case.shape, dtype, 2, channels_last)
    y, grads = on_device(layer, batch, dy)
    for _ in range(size(20, 2)):
        again, grads_again = on_device(layer, batch, dy)
        assert torch.equal(again, y)
        for name, grad in grads.items():
            assert torch.equal(grads_again[name], grad), name


def pieces(t):
    """Yield (channel, flat values) of (N, C, *) in pieces that float64 has room for."""
    for c in range(t.shape[1]):
        for sample in t[:, c].unsqueeze(1) if t.dim() > 2 else [t[:, c]]:
            for piece in sample.reshape(-1).split(2**26):
                yield c, piece


@needs_memory(40)
@pytest.mark.parametrize(
    "shape",
    [size((3, 2, 2**29 + 1), (3, 2, 41)), size((2**29 + 3, 5), (43, 5)), size((1, 1, 2**31 + 16), (1, 1, 48))],
    ids=str,
)
def test_more_values_than_31_bits_count(record_property, shape):
    """In bf16, in both orders of memory. The oracle takes piece by piece."""
    x, dy = (torch.empty(shape, device=DEVICE, dtype=BF16).normal_() for _ in range(2))
    x.add_(1).requires_grad_()
    assert size(x.numel() > 2**31, True)
    layer = syncnorm.SyncBatchNorm(shape[1], momentum=1.0, device=DEVICE)
    y = layer(x)
    grads = torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
    n = x.numel() // shape[1]
    with torch.no_grad():
        sums = torch.zeros(2, shape[1], dtype=F64, device=DEVICE)
        for c, piece in pieces(x):
            sums[0, c] += piece.sum(dtype=F64)
        mean = sums[0] / n
        for c, piece in pieces(x):
            sums[1, c] += (piece.double() - mean[c]).square().sum()
        invstd = (sums[1] / n + 1e-5).rsqrt()
        check(record_property, "running_mean, 2^31 values", layer.running_mean, mean, 2e-6)
        check(record_property, "running_var, 2^31 values", layer.running_var, sums[1] / (n - 1), 2e-6)
        dweight, dbias = torch.zeros(2, shape[1], dtype=F64, device=DEVICE)
        for (c, x_piece), (_, dy_piece) in zip(pieces(x), pieces(dy), strict=True):
            dbias[c] += dy_piece.sum(dtype=F64)
            dweight[c] += (dy_piece.double() * (x_piece.double() - mean[c]) * invstd[c]).sum()
        check(record_property, "dweight, 2^31 values", grads[1], dweight, 1e-4)
        check(record_property, "dbias, 2^31 values", grads[2], dbias, 1e-4)
        eps = torch.finfo(BF16).eps
        for four in zip(*map(pieces, (x, dy, y, grads[0])), strict=True):
            c, (x_piece, dy_piece, y_piece, dx_piece) = four[0][0], [piece for _, piece in four]
            normalized = (x_piece.double() - mean[c]) * invstd[c]
            dx = invstd[c] * (dy_piece.double() - (dbias[c] + normalized * dweight[c]) / n)
            assert error(y_piece, normalized) <= eps
            assert error(dx_piece, dx) <= eps
