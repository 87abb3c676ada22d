"""The four kernels in plain PyTorch operations: what every faster implementation has to agree with.

They work on any device, and they are differentiable, so that they also carry the double backward.

Shapes: input, grad_output and results (N, C, *); everything per channel (C,).
Tensors of the input's size are computed in float32, in float64 if the input is float64; what is per channel comes and
goes in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["grad_input", "moments", "normalize", "reduce_grad"]


def moments(input: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and M2 = Σ (x - mean)² of each channel, (C,) float64 each; zeros for an empty input.

    The sums are of x - shift, where the shift is a first estimate of the mean, so they keep their digits however
    large the mean is.
    """
    axes = _reduced_axes(input)
    count = input.numel() // max(input.shape[1], 1)
    if count == 0:
        zeros = input.new_zeros(input.shape[1], dtype=torch.float64)
        return zeros, zeros.clone()
    x = input.to(_compute_dtype(input))
    shift = x.mean(axes)
    centered = x - _per_channel(shift, x)
    correction = centered.sum(axes).double() / count
    m2 = centered.square().sum(axes).double() - count * correction.square()
    return shift.double() + correction, m2.clamp_min(0)


def normalize(input: Tensor, mean: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return (x - mean) * scale + bias in the dtype and the memory format of the input."""
    y = _centered(input, mean)
    y = y * _per_channel(scale, y)
    if bias is not None:
        y = y + _per_channel(bias, y)
    return y.to(input.dtype)


def reduce_grad(grad_output: Tensor, input: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ dy and Σ dy * (x - mean) of each channel, (C,) float64 each."""
    axes = _reduced_axes(input)
    centered = _centered(input, mean)
    dy = grad_output.to(centered.dtype)
    return dy.sum(axes).double(), (dy * centered).sum(axes).double()


def grad_input(
    grad_output: Tensor, input: Tensor, mean: Tensor, scale: Tensor, slope: Tensor | None, offset: Tensor | None
) -> Tensor:
    """Return scale * dy + slope * (x - mean) + offset in the dtype and the memory format of the input.

    Without slope and offset (constant statistics) it is scale * dy.
    """
    if slope is None or offset is None:
        dx = torch.zeros_like(input, dtype=_compute_dtype(input))  # whose memory format the sum takes
    else:
        dx = _centered(input, mean)
        dx = dx * _per_channel(slope, dx) + _per_channel(offset, dx)
    return (dx + grad_output.to(dx.dtype) * _per_channel(scale, dx)).to(input.dtype)


def _centered(input: Tensor, mean: Tensor) -> Tensor:
    """Return x - mean with the mean as a high and a low part, which together keep its float64 digits."""
    x = input.to(_compute_dtype(input))
    high = mean.to(x.dtype)
    low = mean - high  # zero where x is float64
    return (x - _per_channel(high, x)) - _per_channel(low, x)


def _compute_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _reduced_axes(input: Tensor) -> list[int]:
    return [0, *range(2, input.dim())]


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """Return (C,) as (1, C, 1, ...) in the dtype of `like`."""
    return vector.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))
