"""The kernels in plain PyTorch operations: what every faster implementation has to agree with.

They work on any device, and they are differentiable, so that they also carry the double backward.

Shapes: input, grad_output, residual and results (N, C, *); weight and bias (C,); everything else per channel in
float64: moments (2C + 1,) = [mean, M2, count], statistics (2C + 1,) = [mean, invstd, count], sums (2C,); mask, or
None for ones, what expands to (N, 1, *): the weight, not below 0, that a position has in the moments. Where it is 0 the
input may hold anything. Tensors of the input's size are computed in float32, in float64 if the input is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.compiler import is_compiling

from . import flags
from .epilogue import LEAST_NOISE, NEGATIVE_SLOPE, PLAIN, Epilogue, Saved, rounding
from .plain import plain
from .signs import from_bits, to_bits
from .vectors import Packed, RawMoments, Running, Stamp, StampError, Statistics, halves

__all__ = [
    "Backward",
    "activate",
    "check",
    "compute_dtype",
    "moments",
    "normalize",
    "or_one",
    "pack",
    "per_channel",
    "preactivation",
    "reduced_axes",
    "tail",
    "unpack",
    "update_running",
]


def moments(input: Tensor, mask: Tensor | None = None, *, stamp: Stamp | None = None) -> RawMoments | Packed:
    """Return mean Σ w x / Σ w, M2 = Σ w (x - mean)² and the count Σ w, (2C + 1,); zeros for an empty input.

    With a stamp, return them packed. The sums are of x - shift, where the shift is a first estimate of the mean, so
    they keep their digits however large the mean is.
    """
    axes = reduced_axes(input)
    x = input.to(compute_dtype(input))
    if mask is None:
        values = math.prod([x.shape[axis] for axis in axes])  # which a tracer follows to other sizes
        count = torch.full((), values, dtype=torch.float64, device=x.device)
    else:
        mask = mask.to(x.dtype)
        count = mask.expand(x.shape[0], 1, *x.shape[2:]).sum(dtype=torch.float64)
        x = x.masked_fill(mask == 0, 0)
    shift = _weighted(x, mask).sum(axes) / or_one(count).to(x.dtype)
    centered = x - per_channel(shift, x)
    correction = _weighted(centered, mask).sum(axes).double() / or_one(count)
    m2 = _weighted(centered.square(), mask).sum(axes).double() - count * correction.square()
    result = RawMoments(torch.cat([shift.double() + correction, m2.clamp_min(0), count.view(1)]))
    if x.dtype == torch.float32 and not is_compiling() and _can_look(result) and not plain(result).isfinite().all():
        return moments(input.double(), mask, stamp=stamp)  # some squares have no float32
    return result if stamp is None else pack(result, stamp)


def _can_look(tensor: Tensor) -> bool:
    """Return whether the values can be read now, without waiting for a GPU. A tracer has none, or must not see it."""
    return plain(tensor).is_cpu and not (torch._C._len_torch_dispatch_stack() or torch._C._is_tracing())


def pack(moments: RawMoments, stamp: Stamp) -> Packed:
    """Return [n·mean, M2 + n·mean², n, h, h²], (2C + 3,), whose sum over shards packs the moments of them all."""
    mean, m2 = halves(moments)
    total = moments[-1] * mean
    return Packed(torch.cat([total, torch.addcmul(m2, total, mean), moments[-1:], *tail(stamp, moments)]))


def unpack(packed: Packed, stamp: Stamp) -> RawMoments:
    """Return the moments, (2C + 1,), that `packed` stands for. Where the stamp does not match, see `check`.

    On a GPU the moments are then 0, as those of an empty batch, so that they do not move the running statistics.
    """
    matches = check(packed, stamp)
    total, total_square = packed[:-3].view(2, -1).unbind()
    count = packed[-3:-2]
    mean = total / or_one(count)
    m2 = torch.addcmul(total_square, total, mean, value=-1).clamp_min(0)
    result = torch.cat([mean, m2, count])
    return RawMoments(result if matches is None else torch.where(matches, result, 0))


def check(summed: Tensor, stamp: Stamp | None) -> Tensor | None:
    """Check that a message, (*, h, h²), was summed over ranks that all had this stamp: see `Stamp`.

    On the CPU a mismatch raises StampError. On a GPU it sets the flag of the device, and nothing waits for the device.
    While torch.compile is tracing nothing is checked, since there is no stamp.

    Returns:
        Whether it matches, () bool, on a GPU. None: it does, or was not checked.
    """
    if stamp is None or stamp.ranks == 1 or is_compiling() or type(plain(summed)) is not Tensor:
        return None
    first = stamp.ranks * stamp.number
    matches = ((plain(summed[-2]) == first) & (plain(summed[-1]) == first * stamp.number)).all()
    if matches.is_cuda:
        flags.set_unless(matches, stamp, matches.get_device())
        return matches
    if not matches:
        raise StampError
    return None


def tail(stamp: Stamp, like: Tensor) -> list[Tensor]:
    """Return h and h², (1,) each, without a copy from the host."""
    numbers = stamp.number, stamp.number**2
    return [torch.full((1,), number, dtype=torch.float64, device=like.device) for number in numbers]


@torch.no_grad()
def update_running(running: Running, moments: RawMoments) -> None:
    """Move the buffers in place towards mean and M2 / (n - 1), by momentum or 1 / num_batches_tracked, if n > 0."""
    (mean, m2), count = halves(moments), moments[-1]
    seen = count > 0  # () bool
    batches = None if running.batches is None else running.batches + seen
    if running.momentum is None:
        assert batches is not None
        factor = 1 / batches.double()
    else:
        factor = torch.full_like(count, running.momentum)
    moved = [
        torch.where(seen, torch.lerp(buffer.double(), batch, factor), buffer)
        for buffer, batch in ((running.mean, mean), (running.var, m2 / or_one(count - 1)))
    ]  # before any buffer moves: an allocation may fail
    running.mean.copy_(moved[0])
    running.var.copy_(moved[1])
    if running.batches is not None and batches is not None:
        running.batches.copy_(batches)  # last: a buffer that a transform cannot write has raised before it moves


def normalize(
    input: Tensor,
    moments: RawMoments | Packed,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    *,
    stamp: Stamp | None = None,
    eps_outside: bool = False,
    epilogue: Epilogue = PLAIN,
    running: Running | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Statistics, Tensor | None]:
    """Return y = activation((x - mean) * invstd * weight + bias + residual), the statistics, and the signs of z.

    invstd is 1 / sqrt(M2 / n + eps), or 1 / (sqrt(M2 / n) + eps) with eps_outside. y has the dtype and the memory
    format of the input. The signs tell whether z > 0, for all values in the order of y's memory. They are None unless
    the epilogue saves signs. `Saved` has their format. The running statistics, if given, are updated. With a stamp, the
    moments are packed sums over its ranks, and `check` checks them before anything is written.
    """
    raw = cast(RawMoments, moments) if stamp is None else unpack(cast(Packed, moments), stamp)
    z, statistics = preactivation(input, raw, weight, bias, residual, eps, eps_outside=eps_outside)
    signs = to_bits(z > 0, input) if epilogue.saves_signs else None
    y = activate(z, epilogue.activation)
    if y.dtype != input.dtype:  # torch.compile of PyTorch 2.11 loses the gradient of an output that `to` only passes on
        y = y.to(input.dtype)
    if epilogue.inplace:
        input.copy_(y)  # which may give another tensor back, where y is of a subclass
    if running is not None:
        update_running(running, raw)
    return (input if epilogue.inplace else y), statistics, signs


def preactivation(
    input: Tensor,
    moments: RawMoments,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    *,
    eps_outside: bool = False,
) -> tuple[Tensor, Statistics]:
    """Return z = (x - mean) * invstd * weight + bias + residual, in the dtype of the arithmetic, and the statistics."""
    mean, m2 = halves(moments)
    variance = m2 / or_one(moments[-1])
    invstd = 1 / (_sqrt(variance) + eps) if eps_outside else (variance + eps).rsqrt()
    statistics = Statistics(torch.cat([mean, invstd, moments[-1:]]))
    return _affine(_centered(input, statistics), statistics, weight, bias, residual), statistics


def activate(z: Tensor, activation: str | None) -> Tensor:
    """Return activation(z)."""
    return _ACTIVATE[activation](z)


class Backward:
    """The two passes of the backward, over x - mean and dz, where dz is the gradient with respect to z.

    Where mask and grad_output are 0, the input and the residual may hold anything: such a position adds nothing, and
    its dz is 0.
    """

    def __init__(
        self,
        grad_output: Tensor,
        saved: Saved,
        statistics: Statistics,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        mask: Tensor | None = None,
        epilogue: Epilogue = PLAIN,
    ):
        self.input, self.statistics, self.weight, self.mask = saved.input, statistics, weight, mask
        self.epilogue = epilogue
        self.dtype_of_dz = grad_output.dtype if saved.has_residual else None
        self.centered, self.dz = _centered_and_grad(grad_output, saved, statistics, weight, bias, mask, epilogue)

    def reduce_grad(
        self, dtype: torch.dtype = torch.float64, *, stamp: Stamp | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of weight and bias, Σ dz * x̂ and Σ dz, and sums = [Σ weight * dz, Σ weight * dz * x̂].

        x̂ is (x - mean) * invstd. The gradients are (C,), in dtype. All are sums over all positions, masked ones too.
        With a stamp the sums are (2C + 2,), [sums, h, h²].
        """
        axes = reduced_axes(self.input)
        _, invstd = halves(self.statistics)
        grad_bias = self.dz.sum(axes).double()
        grad_weight = (self.dz * self.centered).sum(axes).double() * invstd
        of_dz = [grad_bias, grad_weight]
        of_dz = of_dz if self.weight is None else [sum * self.weight for sum in of_dz]
        sums = torch.cat([*of_dz, *([] if stamp is None else tail(stamp, grad_bias))])
        return grad_weight.to(dtype), grad_bias.to(dtype), sums

    def grad_input(
        self,
        sums: Tensor | None,
        *,
        stamp: Stamp | None = None,
        centered: bool = True,
        eps_outside: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Return dx in the dtype and the memory format of the input, and dz if something of a residual was saved.

            dx = weight * invstd * dz - w * invstd * (first + second * x̂) / n,    sums = [first, second]

        `sums` are those of all shards together; without them the statistics are constants and
        dx = weight * invstd * dz. With a stamp they are (2C + 2,), and `check` checks them. Moments about zero (not
        `centered`) have no first sum; with an epsilon outside of the root the second is divided by 1 - eps * invstd.
        """
        mask = self.mask
        _, invstd = halves(self.statistics)
        if sums is None:
            dx = torch.zeros_like(self.centered)  # whose memory format the sum takes
        else:
            check(sums, stamp)
            first, second = (sums if stamp is None else sums[:-2]).view(2, -1).unbind()
            count = or_one(self.statistics[-1])
            inside = 1 - eps_outside * invstd  # 0 where all values are, at which x is too
            slope = -invstd * second / (count * torch.where(inside > 0, inside, 1))
            dx = self.centered
            dx = dx if mask is None else torch.where(mask == 0, 0, dx)  # masked_fill lays it out anew
            dx = dx * per_channel(invstd, dx) * per_channel(slope, dx)  # whose product may have no float32
            if centered:
                dx = dx - per_channel(invstd * first / count, dx)
            dx = _weighted(dx, mask)
        dx = dx + self.dz * per_channel(_scale(self.statistics, self.weight), dx)
        return dx.to(self.input.dtype), None if self.dtype_of_dz is None else self.dz.to(self.dtype_of_dz)


def _centered_and_grad(
    grad_output: Tensor,
    saved: Saved,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    epilogue: Epilogue,
) -> tuple[Tensor, Tensor]:
    """Return x - mean, and dz from dy = grad_output: what passes through the activation."""
    input, activation = saved.input, epilogue.activation
    dy = grad_output.to(compute_dtype(input))
    void = None if mask is None else (mask == 0) & (dy == 0)  # where z and x may be no numbers

    def filled(values: Tensor) -> Tensor:
        return values if void is None else torch.where(void, 0, values)  # masked_fill would lay it out anew

    if epilogue.inplace:  # input is y
        z = y = filled(input.to(dy.dtype))
        if activation == "leaky_relu":
            z, dy = torch.where(y > 0, y, y / NEGATIVE_SLOPE), torch.where(y > 0, dy, dy * NEGATIVE_SLOPE)
        z = z if bias is None else z - per_channel(bias, z)
        return filled(z * per_channel(_inverse(statistics, weight, bias, input.dtype, activation), z)), dy
    centered = filled(_centered(input, statistics))
    if activation is None:
        return centered, dy
    if saved.signs is not None:
        positive = from_bits(saved.signs, input)
        return centered, torch.where(positive, dy, dy * NEGATIVE_SLOPE if activation == "leaky_relu" else 0)
    z = filled(_affine(centered, statistics, weight, bias, saved.residual))
    return centered, _BACKWARD[activation](dy, z)


def _affine(
    centered: Tensor, statistics: Statistics, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    z = centered * per_channel(_scale(statistics, weight), centered)
    z = z if bias is None else z + per_channel(bias, z)
    return z if residual is None else z + residual.to(z.dtype)


def _gelu_tanh_derivative(z: Tensor) -> Tensor:
    z = z.clamp(-10, 10)  # beyond, the derivative is 0 or 1 to the last digit, but z³ may overflow
    inner = 0.7978845608028654 * (z + 0.044715 * z**3)  # sqrt(2 / π)
    tanh = inner.tanh()
    slope = 0.7978845608028654 * (1 + 3 * 0.044715 * z.square())
    return 0.5 * (1 + tanh) + 0.5 * z * (1 - tanh.square()) * slope


def _silu_derivative(z: Tensor) -> Tensor:
    sigmoid = z.sigmoid()
    return sigmoid * (1 + z * (1 - sigmoid))


_ACTIVATE: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, NEGATIVE_SLOPE),
    "silu": F.silu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}
_BACKWARD: dict[str | None, Callable[[Tensor, Tensor], Tensor]] = {  # dy and z -> dz
    "relu": lambda dy, z: torch.where(z > 0, dy, 0),
    "leaky_relu": lambda dy, z: torch.where(z > 0, dy, dy * NEGATIVE_SLOPE),
    "silu": lambda dy, z: dy * _silu_derivative(z),
    "gelu_tanh": lambda dy, z: dy * _gelu_tanh_derivative(z),
}


def _weighted(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values * mask.to(values.dtype)


def _centered(input: Tensor, statistics: Statistics) -> Tensor:
    """Return x - mean with the mean as a high and a low part, which together keep its float64 digits."""
    x, (mean, _) = input.to(compute_dtype(input)), halves(statistics)
    high = mean.to(x.dtype)
    low = mean - high  # zero where x is float64
    return (x - per_channel(high, x)) - per_channel(low, x)


def _scale(statistics: Statistics, weight: Tensor | None) -> Tensor:
    _, invstd = halves(statistics)
    return invstd if weight is None else invstd * weight


def _inverse(
    statistics: Statistics, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype, activation: str | None
) -> Tensor:
    """Return what z - bias is multiplied by to give x - mean, where z was rounded to the dtype of y.

    That is 1 / scale as long as the weight is larger than what rounding adds to z. Below, the quotient would be that
    noise over the weight, without bound. With x̂ of variance 1 and noise of variance σ², near z = bias, the estimate of
    least mean square error is x̂ = (z - bias) * weight / (weight² + σ²): its error is never larger than x̂ itself, and
    where the weight is 0 it is 0.
    """
    _, invstd = halves(statistics)
    scale, (relative, least) = _scale(statistics, weight), rounding(dtype, activation)
    noise = invstd * least if bias is None else invstd * (relative * bias.detach().abs() + least)
    return scale / (scale.square() + noise.clamp_min(LEAST_NOISE).square())


def compute_dtype(input: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _sqrt(variance: Tensor) -> Tensor:
    """Return the root. At 0 its derivative is 0, not infinity: x - mean is 0 too, and their product would be NaN."""
    zero = variance == 0
    return torch.where(zero, 1, variance).sqrt().masked_fill(zero, 0)


def or_one(count: Tensor) -> Tensor:
    """Return a count to divide by: 1 where there is nothing."""
    return torch.where(count > 0, count, 1)


def reduced_axes(input: Tensor) -> list[int]:
    """Return all axes but the channels'."""
    return [0, *range(2, input.dim())]


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """Return (C,) as (1, C, 1, ...) in the dtype of `like`."""
    return vector.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))
