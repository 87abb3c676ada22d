"""Count, mean and M2 of a batch, per channel; of one rank or, summed on the wire, of all ranks.

Shapes: input (N, C, *), mean and m2 (C,), count (); packed (2C + 1,). All moments are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels

__all__ = ["Moments"]


@dataclass(frozen=True)
class Moments:
    """The moments of a set of values, for each of C channels.

    Attributes:
        count: number of values per channel, () float64.
        mean: their mean, (C,) float64; 0 of no values.
        m2: Σ (x - mean)², (C,) float64.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, input: Tensor) -> Moments:
        """Return the moments of (N, C, *) over all axes but the channels'."""
        mean, m2 = kernels.select(input.device).moments(input)
        return cls(mean.new_full((), count_per_channel(input)), mean, m2)

    def pack(self) -> Tensor:
        """Return [n·mean, M2 + n·mean², n], (2C + 1,) float64: the sum over the ranks packs the whole batch."""
        total = self.count * self.mean
        return torch.cat([total, torch.addcmul(self.m2, total, self.mean), self.count.view(1)])

    @classmethod
    def unpack(cls, packed: Tensor) -> Moments:
        """Return the moments that `packed`, (2C + 1,) float64, stands for."""
        total, total_square, count = packed[:-1].view(2, -1)[0], packed[:-1].view(2, -1)[1], packed[-1]
        mean = total / count.clamp_min(1)
        return cls(count, mean, torch.addcmul(total_square, total, mean, value=-1).clamp_min(0))

    @property
    def variance(self) -> Tensor:
        """The biased variance M2 / n, (C,); 0 of no values."""
        return self.m2 / self.count.clamp_min(1)

    @property
    def unbiased_variance(self) -> Tensor:
        """The unbiased variance M2 / (n - 1), (C,); 0 of fewer than two values."""
        return self.m2 / (self.count - 1).clamp_min(1)


def count_per_channel(input: Tensor) -> int:
    """Return how many values each channel of (N, C, *) has, without asking the device."""
    return input.numel() // max(input.shape[1], 1)
