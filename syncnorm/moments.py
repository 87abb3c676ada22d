"""Count, mean and M2 of a batch, per channel; of one rank or, summed on the wire, of all ranks.

Shapes: input (N, C, *), mask what expands to (N, 1, *), mean and m2 (C,), count (); packed (2C + 1,), or (C + 1,) about
zero. All moments are float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import kernels, transforms

__all__ = ["Moments", "MomentsAboutZero"]


@dataclass(slots=True)
class Moments:
    """The moments of a set of values, for each of C channels.

    Attributes:
        values: [mean, M2, count], (2C + 1,) float64.
        followed: whether something follows how they come from the input, as `transforms` tells.
        centered: whether they are about the mean; else about zero, and `values` is [0, Σ x², count].
    """

    values: Tensor
    followed: bool = False

    centered: ClassVar[bool] = True

    @classmethod
    def of(cls, input: Tensor, mask: Tensor | None = None) -> Moments:
        """Return the moments of (N, C, *) over all axes but the channels', weighted by the mask.

        They have no autograd graph, which `normalize` does without, unless a transform needs it.
        """
        if transforms.active():
            return cls(kernels.reference.moments(input, mask), followed=True)
        return cls(kernels.select(input, mask).moments(input.detach(), mask))

    def pack(self) -> Tensor:
        """Return [n·mean, M2 + n·mean², n], (2C + 1,) float64: the sum over the ranks packs the whole batch.

        It takes the memory of the moments, which are no more: a layer sends and receives by one buffer.
        """
        return _kernels(self.values, self.followed).pack(self.values)

    @classmethod
    def unpack(cls, packed: Tensor, followed: bool = False) -> Moments:
        """Return the moments that `packed`, (2C + 1,) float64, stands for, in its memory."""
        return cls(_kernels(packed, followed).unpack(packed), followed)

    @classmethod
    def constant(cls, mean: Tensor, variance: Tensor) -> Moments:
        """Return moments of this mean and variance, as if of one value, for statistics that are given."""
        values = torch.cat([mean.double(), variance.double(), mean.new_ones(1, dtype=torch.float64)])
        return cls(values.detach(), followed=transforms.active())

    @property
    def count(self) -> Tensor:
        """The number of values per channel, or the sum of their weights, ()."""
        return self.values[-1]

    @property
    def mean(self) -> Tensor:
        """The mean, (C,); 0 of no values."""
        return self.values[: len(self.values) // 2]

    @property
    def m2(self) -> Tensor:
        """Σ (x - mean)², (C,)."""
        return self.values[len(self.values) // 2 : -1]

    @property
    def variance(self) -> Tensor:
        """The biased variance M2 / n, (C,); 0 of no values."""
        return self.m2 / kernels.reference.or_one(self.count)

    @property
    def unbiased_variance(self) -> Tensor:
        """The unbiased variance M2 / (n - 1), (C,); 0 of fewer than two values."""
        return self.m2 / kernels.reference.or_one(self.count - 1)


class MomentsAboutZero(Moments):
    """Moments whose mean is 0 by definition: `m2` is Σ x², and the variance the mean square."""

    centered = False

    @classmethod
    def of(cls, input: Tensor, mask: Tensor | None = None) -> MomentsAboutZero:
        """Return the moments of (N, C, *) over all axes but the channels', weighted by the mask."""
        about_mean = Moments.of(input, mask)
        return cls.unpack(about_mean.pack()[input.shape[1] :], about_mean.followed)

    def pack(self) -> Tensor:
        """Return [Σ x², n], (C + 1,) float64."""
        return self.values[len(self.mean) :].clone()

    @classmethod
    def unpack(cls, packed: Tensor, followed: bool = False) -> MomentsAboutZero:
        """Return the moments that `packed`, (C + 1,) float64, stands for."""
        return cls(torch.cat([torch.zeros_like(packed[:-1]), packed]), followed)


def _kernels(tensor: Tensor, followed: bool) -> kernels.Kernels:
    return kernels.reference if followed else kernels.select(tensor)
