"""Count, mean and M2 of a batch, per channel; of one rank or, summed on the wire, of all ranks.

Shapes: input (N, C, *), mask what expands to (N, 1, *), mean and m2 (C,), count (); packed (2C + 1,), or (C + 1,) about
zero. All moments are float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import kernels

__all__ = ["Moments", "MomentsAboutZero", "count_per_channel", "or_one"]


@dataclass(frozen=True)
class Moments:
    """The moments of a set of values, for each of C channels.

    Attributes:
        count: number of values per channel, or the sum of their weights, () float64.
        mean: their mean, (C,) float64; 0 of no values.
        m2: Σ (x - mean)², (C,) float64.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    centered: ClassVar[bool] = True  # about the mean

    @classmethod
    def of(cls, input: Tensor, mask: Tensor | None = None) -> Moments:
        """Return the moments of (N, C, *) over all axes but the channels', weighted by the mask."""
        mean, m2 = kernels.select(input.device).moments(input, mask)
        return cls(_count(input, mask, mean), mean, m2)

    def pack(self) -> Tensor:
        """Return [n·mean, M2 + n·mean², n], (2C + 1,) float64: the sum over the ranks packs the whole batch."""
        total = self.count * self.mean
        return torch.cat([total, torch.addcmul(self.m2, total, self.mean), self.count.view(1)])

    @classmethod
    def unpack(cls, packed: Tensor) -> Moments:
        """Return the moments that `packed`, (2C + 1,) float64, stands for."""
        total, total_square, count = packed[:-1].view(2, -1)[0], packed[:-1].view(2, -1)[1], packed[-1]
        mean = total / or_one(count)
        return cls(count, mean, torch.addcmul(total_square, total, mean, value=-1).clamp_min(0))

    @property
    def variance(self) -> Tensor:
        """The biased variance M2 / n, (C,); 0 of no values."""
        return self.m2 / or_one(self.count)

    @property
    def unbiased_variance(self) -> Tensor:
        """The unbiased variance M2 / (n - 1), (C,); 0 of fewer than two values."""
        return self.m2 / or_one(self.count - 1)


class MomentsAboutZero(Moments):
    """Moments whose mean is 0 by definition: `m2` is Σ x², and the variance the mean square."""

    centered = False

    @classmethod
    def of(cls, input: Tensor, mask: Tensor | None = None) -> MomentsAboutZero:
        """Return the moments of (N, C, *) over all axes but the channels', weighted by the mask."""
        mean, m2 = kernels.select(input.device).moments(input, mask)
        count = _count(input, mask, mean)
        return cls(count, torch.zeros_like(mean), torch.addcmul(m2, count * mean, mean))

    def pack(self) -> Tensor:
        """Return [Σ x², n], (C + 1,) float64."""
        return torch.cat([self.m2, self.count.view(1)])

    @classmethod
    def unpack(cls, packed: Tensor) -> MomentsAboutZero:
        """Return the moments that `packed`, (C + 1,) float64, stands for."""
        return cls(packed[-1], torch.zeros_like(packed[:-1]), packed[:-1])


def or_one(count: Tensor) -> Tensor:
    """Return a count to divide by: 1 where there is nothing."""
    return torch.where(count > 0, count, 1)


def _count(input: Tensor, mask: Tensor | None, like: Tensor) -> Tensor:
    if mask is None:
        return like.new_full((), count_per_channel(input))
    return mask.expand(len(input), 1, *input.shape[2:]).sum(dtype=torch.float64)


def count_per_channel(input: Tensor) -> int:
    """Return how many values each channel of (N, C, *) has, without asking the device."""
    return input.numel() // max(input.shape[1], 1)
