"""Count, mean and M2 of a batch, for each channel: of one rank or, after the all-reduce, of all ranks.

Shapes: input (N, C, *), mask what expands to (N, 1, *), mean and m2 (C,), count (); packed (2C + 1,), or (C + 1,) about
zero. All moments are float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from . import kernels, transforms
from .kernels import Kernels, Packed, RawMoments

__all__ = ["Moments", "MomentsAboutZero"]


@dataclass(slots=True)
class Moments:
    """The moments of a set of values, for each of C channels.

    Attributes:
        values: [mean, M2, count], (2C + 1,) float64. Moments about zero have [0, Σ x², count].
        kernels: the implementation for the whole forward pass. Where a transform follows each operation, it is the
            reference, which torch differentiates.
        followed: whether a transform follows how they come from the input, as `transforms` tells.
        constant: whether they were given, and do not depend on the input.
    """

    values: RawMoments
    kernels: Kernels
    followed: bool = False
    constant: bool = False

    centered: ClassVar[bool] = True  # about the mean; else about zero

    @classmethod
    def of(cls, input: Tensor, mask: Tensor | None = None, *others: Tensor | None) -> Moments:
        """Return the moments of (N, C, *) over all axes but the channels', weighted by the mask.

        They have no autograd graph, which `normalize` does without, unless a transform needs it. `others` are the
        further tensors of the forward pass, which its kernels have to support.
        """
        if transforms.active():
            return cls(kernels.reference.moments(input, mask), kernels.reference, followed=True)
        chosen = kernels.select(input, mask, *others)
        return cls(chosen.moments(input.detach(), mask), chosen)

    @classmethod
    def given(cls, mean: Tensor, variance: Tensor, input: Tensor, *others: Tensor | None) -> Moments:
        """Return moments with this mean and variance, which do not depend on the input. `others`: as in `of`."""
        values = torch.cat([mean.double(), variance.double(), mean.new_ones(1, dtype=torch.float64)]).detach()
        followed = transforms.active()
        chosen = kernels.reference if followed else kernels.select(input, mean, variance, *others)
        return cls(RawMoments(values), chosen, followed, constant=True)

    def pack(self) -> Packed:
        """Return [n·mean, M2 + n·mean², n], (2C + 1,): summed over the ranks, it is that of the whole batch.

        It takes the memory of the moments, which are then invalid: a layer sends and receives in one buffer.
        """
        return self.kernels.pack(self.values)

    def unpack(self, packed: Packed) -> Moments:
        """Return the moments of the whole batch from the sum of what the ranks packed, in its memory."""
        return type(self)(self.kernels.unpack(packed), self.kernels, self.followed)

    @property
    def count(self) -> Tensor:
        """The number of values per channel, or the sum of their weights, ()."""
        return self.values[-1]

    @property
    def mean(self) -> Tensor:
        """The mean, (C,); 0 of no values."""
        return kernels.halves(self.values)[0]

    @property
    def m2(self) -> Tensor:
        """Σ (x - mean)², (C,)."""
        return kernels.halves(self.values)[1]

    @property
    def variance(self) -> Tensor:
        """The biased variance M2 / n, (C,); 0 of no values."""
        return self.m2 / kernels.reference.or_one(self.count)

    @property
    def unbiased_variance(self) -> Tensor:
        """The unbiased variance M2 / (n - 1), (C,); 0 of fewer than two values."""
        return self.m2 / kernels.reference.or_one(self.count - 1)


class MomentsAboutZero(Moments):
    """Moments whose mean is 0 by definition: `m2` is Σ x², and the variance is the mean square."""

    centered = False

    @classmethod
    def of(cls, input: Tensor, mask: Tensor | None = None, *others: Tensor | None) -> MomentsAboutZero:
        """Return the moments of (N, C, *) over all axes but the channels', weighted by the mask.

        Packed moments about the mean hold those about zero: Σ x² = M2 + n·mean². So any kernel computes them.
        """
        about_mean = Moments.of(input, mask, *others)
        packed = cast(Packed, about_mean.pack()[input.shape[1] :])
        return cls(_about_zero(packed), about_mean.kernels, about_mean.followed)

    def pack(self) -> Packed:
        """Return [Σ x², n], (C + 1,)."""
        return Packed(self.values[len(self.mean) :].clone())

    def unpack(self, packed: Packed) -> MomentsAboutZero:
        """Return the moments of the whole batch from the sum of what the ranks packed, (C + 1,)."""
        return MomentsAboutZero(_about_zero(packed), self.kernels, self.followed)


def _about_zero(packed: Packed) -> RawMoments:
    return RawMoments(torch.cat([torch.zeros_like(packed[:-1]), packed]))
