"""The four kernels in plain PyTorch operations: what every faster implementation has to agree with.

They work on any device, and they are differentiable, so that they also carry the double backward.

Shapes: input, grad_output and results (N, C, *); everything per channel (C,); mask, or None for ones, what expands to
(N, 1, *): the weight, not below 0, that a position has in the moments. Where it is 0 the input may hold anything.
Tensors of the input's size are computed in float32, in float64 if the input is float64; what is per channel comes and
goes in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["grad_input", "moments", "normalize", "reduce_grad"]


def moments(input: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean Σ w x / Σ w and M2 = Σ w (x - mean)² of each channel, (C,) float64 each; zeros for an empty input.

    The sums are of x - shift, where the shift is a first estimate of the mean, so they keep their digits however
    large the mean is.
    """
    axes = _reduced_axes(input)
    x = input.to(_compute_dtype(input))
    if mask is None:
        count = torch.full((), max(x.numel() // max(x.shape[1], 1), 1), dtype=torch.float64, device=x.device)
    else:
        mask = mask.to(x.dtype)
        count = mask.expand(x.shape[0], 1, *x.shape[2:]).sum(dtype=torch.float64)
        count = torch.where(count > 0, count, 1)
        x = x.masked_fill(mask == 0, 0)
    shift = _weighted(x, mask).sum(axes) / count.to(x.dtype)
    centered = x - _per_channel(shift, x)
    correction = _weighted(centered, mask).sum(axes).double() / count
    m2 = _weighted(centered.square(), mask).sum(axes).double() - count * correction.square()
    return shift.double() + correction, m2.clamp_min(0)


def normalize(input: Tensor, mean: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return (x - mean) * scale + bias in the dtype and the memory format of the input."""
    y = _centered(input, mean)
    y = y * _per_channel(scale, y)
    if bias is not None:
        y = y + _per_channel(bias, y)
    return y.to(input.dtype)


def reduce_grad(grad_output: Tensor, input: Tensor, mean: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return Σ dy and Σ dy * (x - mean) of each channel, (C,) float64 each, over all positions, masked ones too."""
    axes = _reduced_axes(input)
    centered = _centered(input, mean)
    dy = grad_output.to(centered.dtype)
    if mask is not None:
        centered = centered.masked_fill((mask == 0) & (dy == 0), 0)  # it may be no number
    return dy.sum(axes).double(), (dy * centered).sum(axes).double()


def grad_input(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    scale: Tensor,
    slope: Tensor | None,
    offset: Tensor | None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return scale * dy + w * (slope * (x - mean) + offset) in the dtype and the memory format of the input.

    Without slope and offset (constant statistics) it is scale * dy.
    """
    if slope is None or offset is None:
        dx = torch.zeros_like(input, dtype=_compute_dtype(input))  # whose memory format the sum takes
    else:
        dx = _centered(input, mean)
        if mask is not None:
            dx = dx.masked_fill(mask == 0, 0)
        dx = _weighted(dx * _per_channel(slope, dx) + _per_channel(offset, dx), mask)
    return (dx + grad_output.to(dx.dtype) * _per_channel(scale, dx)).to(input.dtype)


def _weighted(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values * mask.to(values.dtype)


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
