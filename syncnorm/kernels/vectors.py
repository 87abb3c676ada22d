"""Three vectors of float64 that mypy tells apart, the stamp of a message, and the running statistics of a layer.

Each vector has C values, C values, and the count, (2C + 1,). A packed one ends with its stamp, (2C + 3,).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, NewType

from torch import Tensor

__all__ = ["Packed", "RawMoments", "Running", "Stamp", "StampError", "Statistics", "halves"]

if TYPE_CHECKING:
    RawMoments = NewType("RawMoments", Tensor)  # [mean, M2, count], with M2 = Σ (x - mean)²
    Packed = NewType("Packed", Tensor)  # [n·mean, M2 + n·mean², n, h, h²]: what the ranks sum
    Statistics = NewType("Statistics", Tensor)  # [mean, invstd, count]: what backward needs
else:  # torch.compile does not trace a NewType

    def _as_it_is(tensor):
        return tensor

    RawMoments = Packed = Statistics = _as_it_is


class Stamp(NamedTuple):
    """What a message belongs to. The ranks sum h and h² beside the values, which shows whether all had the same h.

    With the same h everywhere, the sums are n·h and n·h². They are exact in float64 for n up to 2^13. If any two ranks
    had different h, the variance of h over the ranks is not 0. Then Σ h = n·h and Σ h² = n·h² hold together on no rank.

    Attributes:
        number: h, 0 <= h < 2^20.
        ranks: n, the number of ranks that sum the message. In a message of 1 rank nothing can be wrong.
    """

    number: int
    ranks: int


class StampError(RuntimeError):
    """The ranks have summed messages with different stamps. Nothing has been written."""


class Running(NamedTuple):
    """The buffers that a forward pass updates, and how.

    Attributes:
        mean: running_mean, (C,).
        var: running_var, (C,).
        batches: num_batches_tracked, () integer, or None.
        momentum: None: 1 / num_batches_tracked, the cumulative average.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor | None
    momentum: float | None

    def contiguous(self) -> Running:
        """Return the buffers, or contiguous copies."""
        batches = None if self.batches is None else self.batches.contiguous()
        return self._replace(mean=self.mean.contiguous(), var=self.var.contiguous(), batches=batches)

    def take(self, updated: Running) -> None:
        """Copy the buffers that were updated in copies of them, because a kernel cannot update these."""
        for buffer, copy in zip(self[:3], updated[:3], strict=True):
            if buffer is not None and copy is not None and buffer is not copy:
                buffer.copy_(copy)


def halves(vector: RawMoments | Statistics) -> tuple[Tensor, Tensor]:
    """Return the two vectors of C values, (C,) each, without the count."""
    one, other = vector[:-1].view(2, -1).unbind()
    return one, other
