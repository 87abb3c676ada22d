"""Count, mean and M2 of a batch, for each channel: of one rank or, after the all-reduce, of all ranks.

Shapes: input (N, C, *), mask what expands to (N, 1, *), values (2C + 1,) float64,
or (2C + 3,) packed with a stamp.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from . import kernels, transforms
from .kernels import Kernels, Packed, RawMoments, Stamp

__all__ = ["Moments"]


@dataclass(slots=True)
class Moments:
    """The moments of a set of values, for each of C channels.

    Attributes:
        values: [mean, M2, count], (2C + 1,) float64; or, packed, [n·mean, M2 + n·mean², n, h, h²], whose sum over the
            ranks is that of the whole batch. Raw moments keep more digits if the mean is large.
        stamp: of packed moments, with h and the number of ranks. None: they are not packed.
        kernels: the implementation for the whole forward pass. Where a transform follows each operation, it is the
            reference, which torch differentiates.
        centered: whether they are about the mean, else about zero: the mean is 0 by definition, and M2 is Σ x².
        followed: whether a transform follows how they come from the input, as `transforms` tells.
        constant: whether they were given, and do not depend on the input.
    """

    values: RawMoments | Packed
    stamp: Stamp | None
    kernels: Kernels
    centered: bool = True
    followed: bool = False
    constant: bool = False

    @classmethod
    def of(
        cls,
        input: Tensor,
        mask: Tensor | None = None,
        *others: Tensor | None,
        stamp: Stamp | None = None,
        are_plain: bool = False,
    ) -> Moments:
        """Return the moments of (N, C, *) over all axes but the channels', weighted by the mask.

        They have no autograd graph, which `normalize` does without, unless a transform needs it. `others` are the
        further tensors of the forward pass, which its kernels have to support. `are_plain`: all are known to be plain
        tensors on the CPU.
        """
        followed = transforms.active()
        chosen: Kernels = kernels.reference
        if not followed:
            chosen = kernels.of_cpu(input.dtype) if are_plain else kernels.select(input, mask, *others)
        detached = input.detach() if chosen is kernels.reference and not followed else input
        values = chosen.moments(detached, mask, stamp=stamp)
        return cls(values, stamp, chosen, followed=followed)

    @classmethod
    def given(cls, mean: Tensor, variance: Tensor, input: Tensor, *others: Tensor | None) -> Moments:
        """Return moments with this mean and variance, which do not depend on the input. `others`: as in `of`."""
        values = torch.cat([mean.double(), variance.double(), mean.new_ones(1, dtype=torch.float64)]).detach()
        followed = transforms.active()
        chosen = kernels.reference if followed else kernels.select(input, mean, variance, *others)
        return cls(RawMoments(values), None, chosen, followed=followed, constant=True)

    def about_zero(self) -> Moments:
        """Return packed moments about zero, of packed moments about the mean: Σ x² = M2 + n·mean²."""
        moments = replace(self, centered=False)
        return moments.with_sums(moments.summands)

    @property
    def summands(self) -> Tensor:
        """What the ranks sum, of packed moments: (2C + 3,), or (C + 3,) about zero."""
        if self.centered:
            return self.values
        _, total_square = kernels.halves(RawMoments(self.values[:-2]))  # whose slices a tracer can follow
        return torch.cat([total_square, self.values[-3:]])

    def clone(self) -> Moments:
        """Return the same moments in memory of their own."""
        return replace(self, values=cast(Packed, self.values.clone()))

    def with_sums(self, sums: Tensor) -> Moments:
        """Return the moments of the whole batch from the sums over the ranks."""
        values = sums if self.centered else torch.cat([torch.zeros_like(sums[:-3]), sums])
        return replace(self, values=Packed(values))

    @property
    def raw(self) -> RawMoments:
        """[mean, M2, count], (2C + 1,). Raises StampError if packed moments were summed with those of another call."""
        if self.stamp is None:
            return cast(RawMoments, self.values)
        return kernels.reference.unpack(cast(Packed, self.values), self.stamp)

    @property
    def count(self) -> Tensor:
        """The number of values per channel, or the sum of their weights, ()."""
        return self.values[-1 if self.stamp is None else -3]
